"""Roots of second-moment matrices: their rank, their error, and how matrices come back."""

import pytest
import torch
from oracles import merge as oracle

from lightning_fedfisher.update import roots
from lightning_fedfisher.update.roots import (
    factor_root,
    flatten_root,
    matrix_of_root,
    root_entries,
    unflatten_root,
)


def _samples(count, size, decay=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, size + 1, dtype=torch.float64).pow(-decay)
    mixed = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return torch.randn(count, size, generator=generator, dtype=torch.float64) * scale @ mixed


def _moment(samples):
    return samples.mT @ samples / len(samples)


def _error(matrix, found):
    """Relative error of the symmetric root, which the merge works with."""
    exact = oracle.root(matrix.double())
    error = torch.linalg.norm(oracle.root(found.double()) - exact)
    return float(error / torch.linalg.norm(exact))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("count", "size"), [(1, 9), (20, 90), (70, 90), (90, 90), (500, 90)])
def test_a_root_has_the_rank_of_its_matrix_and_gives_it_back(count, size, dtype):
    matrix = _moment(_samples(count, size)).to(dtype)
    root, tail = factor_root(matrix, most=size)
    assert root.shape == (min(count, size), size)
    assert root.dtype == dtype
    assert tail == 0
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
    torch.testing.assert_close(root.mT @ root, matrix, **tolerance)
    assert _error(matrix, root.double().mT @ root.double()) < 3e-4


@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("count", [150, 1000])
def test_no_direction_is_lost_but_in_rounding(decay, count):
    # The rounding of float32 moves eigenvalues by 1e-7 of the largest.
    matrix = _moment(_samples(count, 200, decay).float())
    root, _ = factor_root(matrix, most=200)
    assert len(root) <= count
    assert _error(matrix, root.double().mT @ root.double()) < 1e-3
    exact = _moment(_samples(count, 200, decay))
    precise, _ = factor_root(exact, most=200)
    assert _error(exact, precise.mT @ precise) < 1e-6


@pytest.mark.parametrize(
    ("decay", "dtype", "expected"),
    [
        (0.0, torch.float32, [(20, torch.float32), (40, torch.float32)]),
        (1.5, torch.float32, [(20, torch.float32), (40, torch.float64)]),
        (0.0, torch.float64, [(20, torch.float64), (40, torch.float64)]),
    ],
)
def test_no_more_is_decomposed_than_it_takes(decay, dtype, expected, monkeypatch):
    tried, original = [], torch.linalg.cholesky_ex

    def counting(matrix):
        tried.append((len(matrix), matrix.dtype))
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counting)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    factor_root(_moment(_samples(1000, 40, decay)).to(dtype), most=40)
    assert tried == expected


def test_what_is_zero_stays_zero():
    samples = _samples(100, 30)
    samples[:, [0, 7, 29]] = 0
    matrix = _moment(samples)
    root, _ = factor_root(matrix, most=30)
    assert len(root) == 27
    assert not root[:, [0, 7, 29]].any()
    torch.testing.assert_close(matrix_of_root(root), matrix)
    nothing, tail = factor_root(torch.zeros(5, 5), most=5)
    assert (nothing.shape, tail, root_entries(5, 0)) == ((0, 5), 0, 0)
    assert torch.equal(matrix_of_root(nothing), torch.zeros(5, 5))


@pytest.mark.parametrize("scale", [1.0, 1e-10])
def test_squares_that_vanish_are_no_refusal(scale):
    """A class that a client is sure of: its probability is tiny, and its square underflows."""
    gradients = torch.tensor([[0.5, -0.5, 0], [0.3, -0.3, 0]]) * scale
    gradients[:, 2] = torch.tensor([1e-23, 2e-24])
    moment = gradients.mT @ gradients
    assert moment[2, 2] == 0
    assert moment[2].any()
    root, _ = factor_root(moment, 3)
    torch.testing.assert_close(root.mT @ root, moment, rtol=1e-5, atol=1e-7 * float(moment.max()))
    with pytest.raises(ValueError, match="is not positive semi-definite"):
        factor_root(torch.tensor([[1.0, 1e-12], [1e-12, 0.0]]), 2)


def test_rows_of_any_scale_are_kept():
    scale = torch.logspace(-6, 6, 25, dtype=torch.float64)
    matrix = _moment(_samples(20, 25)) * scale * scale.unsqueeze(1)
    root, _ = factor_root(matrix.float(), most=25)
    assert len(root) == 20
    relative = matrix_of_root(root.double()) / scale / scale.unsqueeze(1)
    torch.testing.assert_close(relative, _moment(_samples(20, 25)), rtol=0, atol=1e-5)


INDEFINITE = [
    [[1.0, 2.0], [2.0, 1.0]],
    [[-1.0, 0.0], [0.0, 1.0]],
    [[0.0, 1.0], [1.0, 1.0]],
    [[1.0, 1.0, 1.0], [1.0, 1.0, 0.5], [1.0, 0.5, 1.0]],  # the diagonal alone does not show it
]


@pytest.mark.parametrize("matrix", INDEFINITE, ids=str)
def test_what_is_not_semi_definite_is_refused(matrix):
    with pytest.raises(ValueError, match="is not positive semi-definite"):
        factor_root(torch.tensor(matrix), most=len(matrix))


def test_what_is_semi_definite_up_to_rounding_has_a_root():
    matrix = _moment(_samples(20, 30)) - 1e-5 * torch.eye(30, dtype=torch.float64)
    root, _ = factor_root(matrix, most=30)
    torch.testing.assert_close(matrix_of_root(root), matrix, rtol=0, atol=1e-4)


def test_what_is_singular_is_found_out_by_half_of_it(monkeypatch):
    tried, original = [], torch.linalg.cholesky_ex

    def counting(matrix):
        tried.append(len(matrix))
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counting)
    root, _ = factor_root(_moment(_samples(15, 40)).float(), most=40)
    assert (len(root), tried) == (15, [20])


# Few rows


@pytest.mark.parametrize("size", [300, 500])
def test_a_narrow_root_is_the_best_of_its_rank(size, monkeypatch):
    monkeypatch.setattr(roots, "_SMALL", 400)
    factor = _moment(_samples(size, size))
    state = torch.get_rng_state()
    root, tail = factor_root(factor, most=20)
    assert torch.equal(torch.get_rng_state(), state)
    values = torch.linalg.eigvalsh(factor)
    assert root.shape == (20, size)
    assert tail == pytest.approx(float(values[:-20].mean()), rel=0.02)
    kept = root.mT @ root + tail * torch.eye(size, dtype=root.dtype)
    assert float(kept.trace()) == pytest.approx(float(factor.trace()), rel=1e-5)
    best = (values[:-20] - values[:-20].mean()).square().sum()
    assert float((kept - factor).square().sum()) < 1.3 * float(best)


def test_a_narrow_root_has_no_row_for_nothing():
    root, tail = factor_root(_moment(_samples(5, 60)), most=20)
    assert root.shape == (5, 60)
    assert tail < 1e-6


# As it is sent


@pytest.mark.parametrize("rank", range(8))
def test_a_root_comes_back_from_the_numbers_it_is_sent_as(rank):
    root = torch.arange(1.0, 7 * rank + 1).view(rank, 7)
    if 2 * rank > 7:
        root = root.triu()
    entries = flatten_root(root)
    assert len(entries) == root_entries(7, rank)
    assert torch.equal(unflatten_root(entries, 7, rank), root)
    assert not (entries == 0).any()


@pytest.mark.parametrize("strip", [1, 7, 256])
@pytest.mark.parametrize("rank", [0, 1, 9, 15, 20])
def test_a_matrix_is_its_root_times_itself(rank, strip, monkeypatch):
    monkeypatch.setattr(roots, "_STRIP", strip)
    root = torch.randn(rank, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    root = root.triu() if 2 * rank > 20 else root
    root[:, 3] = 0
    matrix = matrix_of_root(root, tail=0.5)
    expected = root.mT @ root
    expected.diagonal().add_(0.5 * (root != 0).any(dim=0))
    torch.testing.assert_close(matrix, expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(matrix, matrix.mT)
