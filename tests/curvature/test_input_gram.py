"""The inputs' second moment is a Kronecker product with the identity, in every operation."""

import pytest
import torch

from lightning_fedfisher.curvature import InputGram, InputMap, Kronecker

ROWS, COLUMNS = 3, 5


def _pair(seed=0, rank=COLUMNS + 1):
    """The same operator as either kind."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(COLUMNS, rank, dtype=torch.float64, generator=generator)
    factor = root @ root.T / rank
    return InputGram(factor, ROWS), Kronecker(torch.eye(ROWS, dtype=torch.float64), factor)


def _same(found, expected):
    matrix = torch.linspace(-1, 2, ROWS * COLUMNS, dtype=torch.float64).view(ROWS, COLUMNS)
    assert type(found) is InputGram
    assert found.shape == expected.shape == (ROWS, COLUMNS)
    torch.testing.assert_close(found.apply(matrix), expected.apply(matrix))


@pytest.mark.parametrize("rank", [COLUMNS + 1, 2], ids=["regular", "singular"])
def test_it_agrees_with_the_identity_on_the_rows(rank):
    gram, kronecker = _pair(rank=rank)
    _same(gram, kronecker)
    _same(gram.power(0.5), kronecker.power(0.5))
    _same(gram.average_over_columns(), kronecker.average_over_columns())
    change = InputMap(torch.randn(2, 2, dtype=torch.float64), inputs=4)
    _same(gram.with_inputs(change), kronecker.with_inputs(change))
    _same(gram.of_inputs(), kronecker)
    _same(kronecker.of_inputs(), kronecker)
    for name in ("trace", "norm", "diagonal", "eigenvalues", "dense"):
        torch.testing.assert_close(getattr(gram, name)(), getattr(kronecker, name)())
    matrix = torch.ones(ROWS, COLUMNS, dtype=torch.float64)
    inverses = gram.pseudo_inverse(1e-9), kronecker.pseudo_inverse(1e-9)
    torch.testing.assert_close(*(inverse.solve(matrix) for inverse in inverses))
    torch.testing.assert_close(*(inverse.project(matrix) for inverse in inverses))
    of_kronecker = kronecker.sensitivities()["column_factor"]
    assert gram.sensitivities() == {"column_factor": pytest.approx(of_kronecker)}


def test_its_mean_is_that_of_the_factors():
    pairs = [_pair(seed) for seed in range(3)]
    weights = [0.5, 0.3, 0.2]
    found = InputGram.mean((gram for gram, _ in pairs), weights)
    _same(found, Kronecker.mean((kronecker for _, kronecker in pairs), weights))


def test_no_tensor_of_the_rows_is_in_memory():
    gram = InputGram(torch.eye(4), rows=10**9)
    inverse = gram.pseudo_inverse(0.0)
    for tensor in (gram.diagonal(), gram.eigenvalues(), inverse.inverse, inverse.support):
        assert tensor.shape == (10**9, 4)
        assert tensor.untyped_storage().nbytes() <= 4 * 4 * 4
    assert float(gram.trace()) == 4 * 10**9
    assert float(gram.norm()) == pytest.approx((4 * 10**9) ** 0.5)
