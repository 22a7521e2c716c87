"""Roots of matrices of low rank: how many rows they take, and what they leave."""

import pytest
import torch

from lightning_fedfisher.curvature.low_rank import pivoted_root


def _moment(samples, size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(samples, size, generator=generator, dtype=torch.float64)
    drawn = drawn * torch.logspace(0, -2, size, dtype=torch.float64)
    return (drawn.mT @ drawn / samples).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("samples", [1, 63, 64, 65, 150])
def test_a_root_has_as_many_rows_as_there_were_samples(samples, dtype):
    matrix = _moment(samples, 300, dtype)
    root, left = pivoted_root(matrix, most=200)
    assert root.shape == (samples, 300)
    assert root.dtype == torch.float64
    rounding = torch.finfo(dtype).eps
    assert left < 10 * rounding
    error = root.mT @ root - matrix
    assert float(error.norm()) < 100 * rounding * float(matrix.trace())


def test_what_is_left_tells_how_much_rank_is_missing():
    matrix = _moment(300, 300)
    root, left = pivoted_root(matrix, most=128)
    assert root.shape == (128, 300)
    rest = matrix - root.mT @ root
    assert float(torch.linalg.eigvalsh(rest)[0]) > -1e-12
    assert left == pytest.approx(float(rest.norm() / matrix.trace()), rel=0.5)


def test_a_matrix_that_is_not_semi_definite_is_left_by_far():
    matrix = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.5], [1.0, 0.5, 1.0]])
    assert pivoted_root(matrix, most=3)[1] > 0.05


def test_no_more_rows_are_found_than_asked_for():
    matrix = _moment(300, 300)
    for most in (1, 63, 64, 100):
        assert len(pivoted_root(matrix, most)[0]) == most


def test_the_same_matrix_has_the_same_root_and_the_generator_is_left_alone():
    matrix, state = _moment(50, 300), torch.get_rng_state()
    first, second = (pivoted_root(matrix, most=100)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
