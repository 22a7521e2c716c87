"""What one client weighs, against dense oracles, and what a hostile one can do."""

import math

import pytest
import torch
from oracles import merge as oracle

from lightning_fedfisher.curvature.base import Identity
from lightning_fedfisher.curvature.dense import Dense
from lightning_fedfisher.curvature.diagonal import Diagonal
from lightning_fedfisher.curvature.embedding import EmbeddingEigenKronecker, EmbeddingKronecker
from lightning_fedfisher.curvature.kronecker import EigenKronecker, Kronecker
from lightning_fedfisher.merge import influence_cap as influence
from lightning_fedfisher.merge.influence_cap import (
    cap,
    measure,
    median,
    multiples,
    shrink_to_median,
)
from lightning_fedfisher.merge.objective import Quadratic

ROWS, COLUMNS = SHAPE = (3, 4)
KINDS = ("identity", "diagonal", "dense", "kronecker", "lookup", "ekfac", "lookup ekfac")
SHARES = (5.0, 1.0, 3.0, 2.0, 7.0)


def _moment(size, generator):
    root = torch.randn(size, 2 * size, generator=generator).double()
    return root @ root.mT


def _curvature(kind, generator):
    match kind:
        case "identity":
            return Identity(SHAPE)
        case "diagonal":
            return Diagonal(torch.rand(SHAPE, generator=generator).double())
        case "dense":
            return Dense(_moment(ROWS * COLUMNS, generator), SHAPE)
        case "kronecker":
            return Kronecker(_moment(ROWS, generator), _moment(COLUMNS, generator))
        case "lookup":
            values = torch.rand(ROWS, generator=generator).double()
            return EmbeddingKronecker(values, _moment(COLUMNS, generator))
    # As aligned inputs leave them, the bases are not orthogonal.
    bases = [torch.randn(n, n, generator=generator).double() for n in SHAPE]
    spectrum = torch.rand(SHAPE, generator=generator).double()
    if kind == "lookup ekfac":
        return EmbeddingEigenKronecker(bases[1], spectrum)
    return EigenKronecker(*bases, spectrum)


def _problem(kind="kronecker", clients=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(SHAPE, generator=generator).double() for _ in range(clients)]
    curvatures = [_curvature(kind, generator) for _ in range(clients)]
    return Quadratic(SHARES[:clients], weights, curvatures)


def _scaled(problem, client, share=1.0, offset=1.0, curvature=1.0):
    """One client made to weigh more."""
    shares, weights = list(problem.client_weights), list(problem.weights)
    curvatures = list(problem.curvatures)
    shares[client] *= share
    weights[client] = weights[client] * offset
    one = curvatures[client]
    curvatures[client] = Kronecker(curvature * one.row_factor, one.column_factor)
    return Quadratic(shares, weights, curvatures)


def _raw(problem, middle=None):
    """What each client weighs, by the median weights of this problem or of another."""
    flat = torch.stack([matrix.flatten() for matrix in problem.weights])
    middle = flat.quantile(0.5, dim=0) if middle is None else middle.flatten()
    rows = []
    for share, weights, curvature in zip(
        problem.client_weights, flat, problem.curvatures, strict=True
    ):
        identity = torch.eye(ROWS * COLUMNS).double()
        dense = identity if curvature.kind == "identity" else oracle.written_out(curvature)
        pull = share * (dense @ (weights - middle)).norm()
        rows.append(torch.stack([share * dense.trace(), (weights - middle).norm(), pull]))
    return torch.stack(rows)


def _oracle(problem):
    table = _raw(problem)
    return table / table.quantile(0.5, dim=0)


@pytest.mark.parametrize("clients", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_measure_is_that_of_the_oracle(kind, clients):
    problem = _problem(kind, clients)
    torch.testing.assert_close(measure(problem), _oracle(problem))


@pytest.mark.parametrize("clients", [1, 2, 3, 4, 7, 16, 17, 40])
@pytest.mark.parametrize("at_once", [1, 8, 2**22])
def test_the_median_is_torchs_quantile(clients, at_once, monkeypatch):
    monkeypatch.setattr(influence, "_AT_ONCE", at_once)
    tensors = list(torch.randn(clients, 3, 5).double())
    torch.testing.assert_close(median(tensors), torch.stack(tensors).quantile(0.5, dim=0))


def test_a_client_that_is_not_a_number_leaves_the_median_to_the_others():
    values = [torch.tensor([value]) for value in (5.0, math.nan, 1.0, 4.0, 2.0)]
    assert float(median(values)) in (2.0, 4.0, 5.0)


def test_multiples_leave_zeros_out_and_keep_infinities():
    values = torch.tensor([[0.0, 0], [2, 0], [4, 0], [6, 0], [math.inf, 0]]).double()
    expected = torch.tensor([0.0, 0.4, 0.8, 1.2, math.inf]).double()
    torch.testing.assert_close(multiples(values)[:, 0], expected)
    assert not multiples(values)[:, 1].any()


@pytest.mark.parametrize("size", [1.0, 1e6])
def test_what_overflows_is_infinite_whatever_the_others_weigh(size):
    weights = [matrix.float() for matrix in _problem().weights]
    curvatures = [Diagonal(torch.full(SHAPE, size * (1 + k))) for k in range(5)]
    curvatures[2] = Diagonal(torch.full(SHAPE, 3e38))  # twelve of them are more than float32 holds
    found = measure(Quadratic(SHARES, weights, curvatures))
    others = [0, 1, 3, 4]
    assert found[2, [0, 2]].isinf().all()
    assert found[2, 1].isfinite()
    assert found[others].isfinite().all()
    shares = torch.tensor(SHARES).double()[others] * torch.tensor([1.0, 2, 4, 5])
    torch.testing.assert_close(found[others, 0] / found[0, 0], shares / shares[0])


def test_weights_that_are_not_finite_are_that_clients_alone():
    problem = _problem()
    weights = [*problem.weights[:4], torch.full(SHAPE, math.nan).double()]
    found = measure(Quadratic(problem.client_weights, weights, problem.curvatures))
    assert found[4, 1:].isinf().all()
    assert found[:4].isfinite().all()


def test_clients_without_information_have_no_part_in_the_median():
    problem = _problem("diagonal")
    curvatures = list(problem.curvatures)
    curvatures[0] = curvatures[4] = Diagonal(torch.zeros(SHAPE).double())
    found = measure(Quadratic(SHARES, problem.weights, curvatures))
    traces = torch.tensor(SHARES[1:4]) * torch.stack([c.values.sum() for c in curvatures[1:4]])
    assert found[0, 0] == found[4, 0] == found[0, 2] == found[4, 2] == 0
    torch.testing.assert_close(found[1:4, 0], traces / traces.median())


def test_nobody_is_held_who_weighs_no_more_than_allowed():
    problem = _problem()
    weighed = measure(problem)
    assert cap(problem, weighed, float(weighed.max())) is problem
    assert cap(problem, weighed, 0.99 * float(weighed.max())) is not problem


@pytest.mark.parametrize("most", [1.0, 2.0, 10.0])
@pytest.mark.parametrize(
    "much", [{"share": 1e8}, {"curvature": 1e8}, {"share": 1e4, "curvature": 1e4}], ids=str
)
def test_nobody_keeps_more_information_or_pull_than_allowed(much, most):
    problem = _scaled(_problem(), 3, **much)
    weighed = measure(problem)
    held = cap(problem, weighed, most)
    # What is left of each share; all are scaled alike to sum to one.
    left = torch.tensor(
        [a / b for a, b in zip(held.client_weights, problem.client_weights, strict=True)]
    ).double()
    left /= left.max()
    assert float(weighed[3, 0]) > 1e6
    expected = (most / weighed[:, [0, 2]].amax(1)).clamp_max(1)
    torch.testing.assert_close(left, expected / expected.max())
    assert float((left * weighed[:, 0]).max()) <= most * (1 + 1e-6) or most == 1


@pytest.mark.parametrize("most", [1.5, 10.0])
def test_nobody_is_farther_away_than_allowed(most):
    problem = _scaled(_problem(), 1, offset=1e6)
    held = cap(problem, measure(problem), most)
    middle = torch.stack(list(problem.weights)).quantile(0.5, dim=0)
    distances = torch.stack([(w - middle).norm() for w in problem.weights])
    left = torch.stack([(w - middle).norm() for w in held.weights])
    torch.testing.assert_close(left, distances.clamp_max(most * distances.quantile(0.5)))


def _times(curvature, factor):
    parts = curvature.tensors()
    name = "spectrum" if "spectrum" in parts else next(iter(parts))
    return type(curvature).from_tensors(parts | {name: factor * parts[name]}, SHAPE)


def _unit(held, problem):
    """What became of a share that was not reduced, when all were scaled to sum to one."""
    return max(
        new / old for new, old in zip(held.client_weights, problem.client_weights, strict=True)
    )


@pytest.mark.parametrize("most", [2.0, 10.0])
@pytest.mark.parametrize("much", ["share", "curvature"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_client_has_a_bounded_share_of_the_information(kind, much, most):
    problem = _problem(kind)
    shares, weights, curvatures = map(list, _parts(problem))
    weights = weights[:1] * 5  # so that nobody has a pull, and information alone is held
    if much == "share" or kind == "identity":
        shares[3] *= 1e8
    else:
        curvatures[3] = _times(curvatures[3], 1e8)
    problem = Quadratic(shares, weights, curvatures)
    before = _raw(problem)[:, 0]
    assert before[3] > 0.999 * before.sum()
    held = cap(problem, measure(problem), most)
    left = _raw(held)[:, 0]
    assert float(left[3] / left.sum()) <= most / (most + (5 - 1) / 2)
    assert float(left[3]) == pytest.approx(most * _unit(held, problem) * float(before.median()))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_clients_send_they_are_within_the_bounds(kind, seed):
    dice = torch.Generator().manual_seed(seed)
    shares, weights, curvatures = _parts(_problem(kind, seed=seed))
    shares = [n * float(10 ** (4 * torch.randn(1, generator=dice))) for n in shares]
    weights = [m * 10 ** (2 * torch.randn(1, generator=dice)) for m in weights]
    problem = Quadratic(shares, weights, curvatures)
    before, weighed = _raw(problem), measure(problem)
    held = cap(problem, weighed, 2.0)
    after = _raw(held, median(weights))
    after[:, [0, 2]] /= _unit(held, problem)
    assert (before > 2.1 * before.median(dim=0).values).any()
    assert (after <= 2.0 * before.median(dim=0).values * (1 + 1e-6)).all()
    for old, new, distance in zip(weights, held.weights, weighed[:, 1], strict=True):
        assert (old is new) == (distance <= 2)


def test_what_is_held_does_not_depend_on_units_or_order():
    problem = _scaled(_problem(), 3, share=1e4, offset=1e4)
    held = cap(problem, measure(problem), 2.0)
    other = Quadratic(
        [7 * share for share in problem.client_weights],
        [3 * matrix for matrix in problem.weights],
        [Kronecker(5 * c.row_factor, c.column_factor) for c in problem.curvatures],
    )
    scaled = cap(other, measure(other), 2.0)
    torch.testing.assert_close(
        torch.tensor(scaled.client_weights), torch.tensor(held.client_weights)
    )
    order = [3, 0, 4, 1, 2]
    other = Quadratic(*([part[i] for i in order] for part in _parts(problem)))
    turned = cap(other, measure(other), 2.0)
    for place, client in enumerate(order):
        torch.testing.assert_close(scaled.weights[client], 3 * held.weights[client])
        torch.testing.assert_close(turned.weights[place], held.weights[client])
        assert turned.client_weights[place] == pytest.approx(held.client_weights[client])


def _parts(problem):
    return problem.client_weights, problem.weights, problem.curvatures


def test_what_is_measured_does_not_depend_on_units_or_order():
    problem = _problem()
    scaled = Quadratic(
        [7 * share for share in problem.client_weights],
        [3 * matrix for matrix in problem.weights],
        [Kronecker(5 * c.row_factor, c.column_factor) for c in problem.curvatures],
    )
    torch.testing.assert_close(measure(scaled), measure(problem))
    order = [3, 0, 4, 1, 2]
    turned = Quadratic(*([part[i] for i in order] for part in _parts(problem)))
    torch.testing.assert_close(measure(turned), measure(problem)[order])


def test_what_needs_not_move_stays_the_same_object():
    tensors = list(torch.randn(3, 4))
    moved = shrink_to_median(tensors, torch.tensor([1.0, 0.5, 1.0]))
    assert moved[0] is tensors[0]
    assert moved[2] is tensors[2]
    middle = torch.stack(tensors).median(dim=0).values
    torch.testing.assert_close(moved[1], (tensors[1] + middle) / 2)
