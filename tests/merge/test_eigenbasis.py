"""Products in the eigenbasis of the mean curvature, against the operators written out."""

import math
from functools import partial

import pytest
import torch
from helpers.quadratics import SHARES, make_spd
from torch.utils.flop_counter import FlopCounterMode

from lightning_fedfisher.curvature.convolution import ConvolutionKronecker
from lightning_fedfisher.curvature.embedding import EmbeddingKronecker
from lightning_fedfisher.curvature.input_gram import InputGram
from lightning_fedfisher.curvature.kronecker import EigenKronecker, Kronecker
from lightning_fedfisher.merge.disk_cache import OnDiskCurvatures
from lightning_fedfisher.merge.eigenbasis import MatvecWithin
from lightning_fedfisher.merge.objective import Quadratic
from lightning_fedfisher.merge.solvers import ConjugateGradient

ROWS, COLUMNS = SHAPE = (6, 5)


def _clients(kind, generator):
    """Clients that share a null space on both sides."""
    rows, columns = (
        torch.linalg.qr(torch.randn(size, size, generator=generator).double()).Q[:, 2:]
        for size in SHAPE
    )
    for _ in SHARES:
        outputs = rows @ make_spd(ROWS - 2, generator) @ rows.mT
        inputs = columns @ make_spd(COLUMNS - 2, generator) @ columns.mT
        if kind == "embedding":
            yield EmbeddingKronecker(outputs.diagonal() * (torch.arange(ROWS) > 1), inputs)
        elif kind == "ekfac":
            yield Kronecker(outputs, inputs).eigendecompose()
        else:
            yield Kronecker(outputs, inputs)


def _problem(kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    curvatures = list(_clients(kind, generator))
    weights = [torch.randn(SHAPE, generator=generator).double() for _ in SHARES]
    return Quadratic(SHARES, weights, curvatures)


def _large_problem(kind):
    """Clients of rank far below their layer's size."""
    generator = torch.Generator().manual_seed(0)

    def factor(size):
        root = torch.randn(max(size // 8, 2), size, generator=generator).double()
        return root.mT @ root

    weights = [torch.randn(40, 54, generator=generator).double() for _ in SHARES]
    seen = torch.arange(40) % 3 == 0
    curvatures = {
        "kronecker": lambda: Kronecker(factor(40), factor(54)),
        "embedding": lambda: EmbeddingKronecker(seen.double(), factor(54)),
        "input_gram": lambda: InputGram(factor(54), rows=40),
        "convolution": lambda: ConvolutionKronecker(factor(40), factor(6), factor(9)),
    }
    return Quadratic(SHARES, weights, [curvatures[kind]() for _ in SHARES])


@pytest.mark.parametrize("kind", ["kronecker", "embedding", "ekfac"])
def test_a_product_is_the_operators_within_the_basis(kind):
    problem = _problem(kind)
    inverse = problem.mean_curvature.pseudo_inverse(1e-6)
    clients = zip(problem.client_weights, problem.curvatures, strict=True)
    dense = sum(p * f.dense() for p, f in clients)
    count = inverse.inverse.numel()
    units = torch.eye(count).double().view(count, *inverse.inverse.shape)
    # The map out of the basis, column by column, where directions count.
    out = torch.stack([inverse.from_eigenbasis(unit).flatten() for unit in units], dim=1)
    out = out * inverse.support.flatten()
    expected = out.mT @ dense @ out
    product = MatvecWithin(problem, inverse)
    found = torch.stack([product(inverse.support * unit).flatten() for unit in units], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert float(expected.norm()) > 0.1
    if kind != "ekfac":  # whose coordinates are all of the matrix's
        assert inverse.inverse.shape == (ROWS - 2, COLUMNS - 2)


def test_what_is_on_disk_is_written_there_in_the_basis(monkeypatch):
    problem = _problem("kronecker")
    inverse = problem.mean_curvature.pseudo_inverse(1e-6)
    device = torch.device("cpu")
    on_disk = Quadratic(SHARES, problem.weights, OnDiskCurvatures(problem.curvatures, device))
    monkeypatch.setattr(MatvecWithin, "_pays", lambda product: product._written is None)
    reads, original = [], OnDiskCurvatures.__getitem__
    monkeypatch.setattr(
        OnDiskCurvatures, "__getitem__", lambda s, i: (reads.append(s), original(s, i))[1]
    )
    here, there = (MatvecWithin(some, inverse) for some in (problem, on_disk))
    matrix = torch.randn(inverse.inverse.shape, dtype=torch.float64)
    assert torch.equal(here(matrix), there(matrix))
    reads.clear()
    assert torch.equal(here(matrix), there(matrix))
    assert len(reads) >= len(SHARES)  # an iteration asks for one more, to find the end
    assert all(stored is not on_disk.curvatures for stored in reads)


def test_a_mean_of_another_kind_restricts_nothing():
    problem = _problem("ekfac")
    assert problem.kind is EigenKronecker
    assert type(problem.mean_curvature) is Kronecker
    solver = ConjugateGradient(problem, tolerance=1e-10)
    solver.advance(1000)
    assert solver.converged
    assert solver.residual <= 1e-9


@pytest.mark.parametrize("kind", ["kronecker", "embedding"])
def test_a_step_makes_no_product_of_the_layers_size(kind, monkeypatch):
    """The factors are written in the eigenbasis once; then the layer's own size is paid no more."""
    monkeypatch.setattr(MatvecWithin, "_pays", lambda product: product._products == 1)
    problem = _problem(kind)
    shapes, owner = [], type(problem.curvatures[0])
    original = owner.apply
    solver = partial(ConjugateGradient, tolerance=1e-10)(problem)
    monkeypatch.setattr(owner, "apply", lambda f, m: (shapes.append(m.shape), original(f, m))[1])
    solver.advance(3)
    assert not solver.finished
    assert shapes == [SHAPE] * len(SHARES) + [(ROWS - 2, COLUMNS - 2)] * 2 * len(SHARES)


def _multiplications(compute):
    """Counts those of products of matrices."""
    with FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("kind", ["kronecker", "embedding", "input_gram", "convolution"])
def test_curvature_is_written_once_products_have_cost_as_much_more(kind, monkeypatch):
    problem = _large_problem(kind)
    inverse = problem.mean_curvature.pseudo_inverse(1e-6)
    product, one = MatvecWithin(problem, inverse), problem.curvatures[0]
    coordinates = torch.randn(inverse.inverse.shape, dtype=torch.float64)
    writing = _multiplications(lambda: [inverse.restriction.write(f) for f in problem.curvatures])
    before = _multiplications(lambda: product(coordinates))
    written = inverse.restriction.write(one)
    after = len(SHARES) * _multiplications(lambda: written.apply(coordinates))
    assert after < before
    written, original = [], MatvecWithin._write
    monkeypatch.setattr(
        MatvecWithin, "_write", lambda s: (written.append(s._products), original(s))[1]
    )
    for _ in range(50):
        product(coordinates)
    assert written == [math.ceil(writing / (before - after))]
