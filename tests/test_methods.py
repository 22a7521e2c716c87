"""The table of methods: what each row accepts, makes of curvature, and ends in."""

import re
from itertools import product
from typing import get_args

import pytest
import torch

from lightning_fedfisher.curvature import Dense, Diagonal, Identity
from lightning_fedfisher.extraction import CURVATURE_TYPES
from lightning_fedfisher.kronecker import (
    EigenKronecker,
    Kronecker,
    LookupEigenKronecker,
    LookupKronecker,
)
from lightning_fedfisher.likelihood import FISHER_TYPES
from lightning_fedfisher.methods import METHODS, MethodName
from lightning_fedfisher.quadratic import Quadratic

PUBLISHED = ("fedfisher_diag", "fedfisher_kfac")
ACCEPTED = {
    "fedavg": {("identity", ""), *product(("diagonal", "kfac", "ekfac", "dense"), FISHER_TYPES)},
    "fisher_merge": set(product(("diagonal",), FISHER_TYPES)),
    "regmean": set(product(("kfac",), FISHER_TYPES)),
    "fedfisher_diag": {("diagonal", "exact")},
    "fedfisher_kfac": {("kfac", "exact")},
    "fedfisher": set(product(("kfac", "ekfac", "diagonal", "dense"), FISHER_TYPES)),
}
UPDATES = [("identity", ""), *product(("diagonal", "kfac", "ekfac", "dense"), FISHER_TYPES)]


def _factor(size, seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, 3 * size, generator=generator, dtype=torch.float64)
    return root @ root.mT / (3 * size)


def _curvatures(seed=0):
    values = _factor(6, seed + 1).diagonal().reshape(2, 3)
    return {
        "diagonal": Diagonal(values),
        "kronecker": Kronecker(_factor(2, seed + 2), _factor(3, seed + 3)),
        "ekfac": EigenKronecker(
            torch.linalg.eigh(_factor(2, seed + 2))[1],
            torch.linalg.eigh(_factor(3, seed + 3))[1],
            values.flip(0),
        ),
        "lookup_kronecker": LookupKronecker(values[:, 0], _factor(3, seed + 3)),
        "lookup_ekfac": LookupEigenKronecker(
            torch.linalg.eigh(_factor(3, seed + 3))[1], values.flip(1)
        ),
        "dense": Dense(_factor(6, seed + 4), (2, 3)),
    }


def _merge(method, kind, shares=(3, 1)):
    """Clients, and what a method makes of them when it runs as the server runs it."""
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in shares]
    curvatures = [_curvatures(seed)[kind] for seed in (10, 20)]
    row = METHODS[method]
    problem = Quadratic(
        shares, weights, [row.transform(curvature, False) for curvature in curvatures]
    )
    solver = row.solver(problem)
    solver.advance(row.iterations)
    return weights, curvatures, solver


def test_every_name_has_a_row():
    assert list(METHODS) == list(get_args(MethodName))
    assert METHODS.keys() == ACCEPTED.keys()


def test_the_table_below_covers_every_update():
    assert {curvature for curvature, _ in UPDATES} == set(CURVATURE_TYPES)


@pytest.mark.parametrize(("curvature", "fisher"), UPDATES)
@pytest.mark.parametrize("method", METHODS)
def test_methods_refuse_what_they_are_not_defined_for(method, curvature, fisher):
    refusal = METHODS[method].refusal(curvature, fisher)
    assert (refusal is None) == ((curvature, fisher) in ACCEPTED[method])


@pytest.mark.parametrize(
    ("method", "curvature", "fisher", "refusal"),
    [
        (
            "fisher_merge",
            "identity",
            "",
            "holds identity curvature: extract it with "
            "FedFisherCallback(curvature='diagonal', ...)",
        ),
        (
            "fedfisher",
            "identity",
            "",
            "holds identity curvature: extract it with FedFisherCallback(curvature='kfac', ...)",
        ),
        (
            "fedfisher_kfac",
            "diagonal",
            "normalised",
            "holds diagonal curvature: extract it with FedFisherCallback(curvature='kfac', ...)",
        ),
        (
            "fedfisher_kfac",
            "kfac",
            "normalised",
            "holds the normalised Fisher: extract it with FedFisherCallback(fisher='exact', ...)",
        ),
        (
            "fedfisher_diag",
            "diagonal",
            "mc",
            "holds the mc Fisher: extract it with FedFisherCallback(fisher='exact', ...)",
        ),
    ],
)
def test_a_refusal_says_what_to_extract(method, curvature, fisher, refusal):
    assert METHODS[method].refusal(curvature, fisher) == refusal


@pytest.mark.parametrize(("curvature", "fisher"), UPDATES)
@pytest.mark.parametrize("method", METHODS)
def test_following_the_remedies_leads_to_an_accepted_update(method, curvature, fisher):
    row, options = METHODS[method], {"curvature": curvature, "fisher": fisher or "exact"}
    for _ in range(2):
        if refusal := row.refusal(**options):
            name, value = re.search(r"\((\w+)='(\w+)', \.\.\.\)", refusal).groups()
            assert options[name] != value
            options[name] = value
    assert row.refusal(**options) is None


@pytest.mark.parametrize("kind", _curvatures())
def test_fedavg_forgets_the_curvature(kind):
    curvature = _curvatures()[kind]
    forgotten = METHODS["fedavg"].transform(curvature, False)
    assert isinstance(forgotten, Identity)
    assert forgotten.shape == curvature.shape
    weights, _, solver = _merge("fedavg", kind)
    assert solver.finished
    torch.testing.assert_close(solver.weights, (3 * weights[0] + weights[1]) / 4)


@pytest.mark.parametrize("kind", _curvatures())
def test_fedfisher_takes_the_square_root(kind):
    curvature = _curvatures()[kind]
    root = METHODS["fedfisher"].transform(curvature, False)
    assert type(root) is type(curvature)
    torch.testing.assert_close(root.dense() @ root.dense(), curvature.dense())
    assert float((root.dense() - curvature.dense()).norm()) > 0.1
    assert torch.linalg.eigvalsh(root.dense()).min() > 0


@pytest.mark.parametrize("kind", _curvatures())
@pytest.mark.parametrize("method", ["fisher_merge", *PUBLISHED])
def test_published_methods_leave_the_curvature_as_it_is(method, kind):
    curvature = _curvatures()[kind]
    assert METHODS[method].transform(curvature, False) is curvature


@pytest.mark.parametrize("kind", _curvatures())
def test_fedfisher_ends_in_the_minimum_of_the_square_roots(kind):
    weights, curvatures, solver = _merge("fedfisher", kind)
    assert solver.finished
    roots = []
    for curvature in curvatures:
        values, basis = torch.linalg.eigh(curvature.dense())
        roots.append((basis * values.sqrt()) @ basis.mT)
    right = 3 * roots[0] @ weights[0].flatten() + roots[1] @ weights[1].flatten()
    expected = torch.linalg.solve(3 * roots[0] + roots[1], right).view(2, 3)
    torch.testing.assert_close(solver.weights, expected, rtol=0, atol=1e-3)
    assert float((solver.weights - solver.problem.average).norm()) > 0.05


def test_fisher_merge_is_weighted_by_the_diagonal():
    weights, curvatures, solver = _merge("fisher_merge", "diagonal")
    first, second = 3 * curvatures[0].values, curvatures[1].values
    expected = (first * weights[0] + second * weights[1]) / (first + second)
    torch.testing.assert_close(solver.weights, expected)


@pytest.mark.parametrize(
    ("method", "kind", "damped"),
    [
        ("fedfisher_diag", "diagonal", lambda g: g.abs() + 0.01),
        ("fedfisher_kfac", "kronecker", lambda g: (g * g + 0.01).sqrt()),
    ],
)
def test_published_methods_take_the_authors_first_step(method, kind, damped):
    _, _, done = _merge(method, kind)
    assert done.iterations == METHODS[method].iterations == 2000
    assert METHODS[method].sweep == 100
    solver = METHODS[method].solver(done.problem)
    gradient = done.problem.gradient(done.problem.average)
    solver.advance(1)
    step = done.problem.average - 0.01 * gradient / damped(gradient)
    torch.testing.assert_close(solver.weights, step, rtol=1e-12, atol=1e-12)


def test_only_the_published_methods_keep_their_best_iterate():
    assert {name for name, row in METHODS.items() if row.keeps_best} == set(PUBLISHED)


@pytest.mark.parametrize("method", METHODS)
def test_a_sweep_is_a_part_of_the_steps(method):
    row = METHODS[method]
    assert 1 <= row.sweep <= row.iterations
    assert row.iterations % row.sweep == 0
