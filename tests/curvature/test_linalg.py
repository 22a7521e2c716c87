"""Roots and eigenpairs of large matrices, in float32 against float64."""

import pytest
import torch

from lightning_fedfisher.curvature import linalg
from lightning_fedfisher.curvature.linalg import (
    change_basis,
    large_eigenpairs,
    pseudo_reciprocal,
    symmetric_eigendecomposition,
    symmetric_power,
)

SIZE = 640


@pytest.fixture(autouse=True)
def _large(monkeypatch):
    """Beyond what is decomposed in float64 anyway."""
    assert linalg._SMALL > SIZE
    monkeypatch.setattr(linalg, "_SMALL", SIZE - 100)


def _second_moment(samples, dtype=torch.float32, mean=3.0):
    """Of inputs with a mean larger than their spread, as those behind a rectifier."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -1, SIZE).double()
    inputs = mean + torch.randn(samples, SIZE, generator=generator).double() * scale
    return (inputs.mT @ inputs / samples).to(dtype)


def _reference_power(matrix, exponent):
    values, vectors = torch.linalg.eigh(matrix.double())
    return (vectors * values.clamp_min(0).pow(exponent)) @ vectors.mT


@pytest.fixture
def decomposed(monkeypatch):
    """Sizes and types of what is decomposed."""
    found, original = [], torch.linalg.eigh

    def noting(matrix):
        found.append((len(matrix), matrix.dtype))
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", noting)
    return found


def test_the_root_of_a_regular_matrix_is_as_exact_as_float32(decomposed):
    matrix = _second_moment(samples=5000)
    expected = _reference_power(matrix, 0.5)
    decomposed.clear()
    root = symmetric_power(matrix, 0.5)
    assert root.dtype == torch.float32
    assert torch.equal(root, root.mT)
    assert float((root - expected).norm() / expected.norm()) < 5e-6
    assert [dtype for size, dtype in decomposed if size == SIZE] == [torch.float32]


def test_small_eigenvalues_keep_their_digits_beside_a_large_mean():
    """What a plain decomposition in float32 loses: it rounds by the largest eigenvalue."""
    matrix = _second_moment(samples=5000)
    expected = _reference_power(matrix, 0.5)
    values, plain = torch.linalg.eigh(matrix)
    naive = (plain * values.clamp_min(0).sqrt()) @ plain.mT
    small = torch.linalg.eigh(matrix.double()).eigenvectors[:, :300]
    lost, error = (
        float(((root.double() - expected) @ small).norm() / (expected @ small).norm())
        for root in (naive, symmetric_power(matrix, 0.5))
    )
    assert error < 1e-5
    assert error < lost / 10


@pytest.mark.parametrize("samples", [200, 500])
@pytest.mark.parametrize("exponent", [0.5, 0.25])
def test_a_singular_power_is_that_of_what_float32_rounded(samples, exponent):
    matrix = _second_moment(samples)
    expected = _reference_power(_second_moment(samples, torch.float64), exponent)
    error = float((symmetric_power(matrix, exponent) - expected).norm() / expected.norm())
    # The power of float32's rounding, in directions that the samples do not have.
    rounding = _reference_power(matrix, exponent) - expected
    assert error < 1.1 * float(rounding.norm() / expected.norm())


def test_the_power_of_a_matrix_of_low_rank_is_found_from_a_root_of_as_many_rows(decomposed):
    matrix = _second_moment(samples=200)
    expected = _reference_power(_second_moment(samples=200, dtype=torch.float64), 0.5)
    decomposed.clear()
    root = symmetric_power(matrix, 0.5)
    assert max(size for size, _ in decomposed) == 200
    assert root.dtype == torch.float32
    assert torch.equal(root, root.mT)
    assert float((root - expected).norm() / expected.norm()) < 1e-5
    # Its square is the matrix, to what float32 holds of it.
    assert float((root.double() @ root.double() - matrix).norm() / matrix.norm()) < 1e-6


def test_rows_that_are_zero_stay_zero():
    matrix = _second_moment(samples=5000)
    dead = torch.arange(SIZE) % 10 == 3
    matrix[dead] = matrix[:, dead] = 0
    root = symmetric_power(matrix, 0.5)
    assert not root[dead].any()
    assert not root[:, dead].any()
    expected = _reference_power(matrix, 0.5)
    assert float((root - expected).norm() / expected.norm()) < 5e-6


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30])
def test_faint_and_huge_matrices_are_decomposed_in_float64(scale, decomposed):
    matrix = (_second_moment(samples=5000).double() * scale).float()
    expected = _reference_power(matrix, 0.5)
    decomposed.clear()
    root = symmetric_power(matrix, 0.5)
    assert float((root - expected).norm() / expected.norm()) < 5e-6
    assert (SIZE, torch.float64) in decomposed


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30])
def test_faint_and_huge_matrices_of_low_rank_have_their_power(scale):
    matrix = (_second_moment(samples=200, dtype=torch.float64) * scale).float()
    expected = _reference_power(_second_moment(samples=200, dtype=torch.float64), 0.5)
    error = symmetric_power(matrix, 0.5).double() / scale**0.5 - expected
    assert float(error.norm() / expected.norm()) < 1e-4


def test_what_float32_does_not_reproduce_is_decomposed_in_float64(monkeypatch):
    matrix, original = _second_moment(samples=5000), torch.linalg.eigh
    expected = original(matrix.double())

    def broken(given):
        values, vectors = original(given)
        if given.dtype == torch.float32:
            vectors[:, :20] *= 1.01  # neither orthogonal nor the matrix's
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    values, _ = symmetric_eigendecomposition(matrix, exact=False)
    torch.testing.assert_close(values, expected[0].float())
    root = symmetric_power(matrix, 0.5)
    reference = _reference_power(matrix, 0.5)
    assert float((root - reference).norm() / reference.norm()) < 5e-6


@pytest.mark.parametrize(("rcond", "dtype"), [(1e-3, torch.float32), (1e-6, torch.float64)])
def test_large_eigenpairs_are_found_in_the_precision_they_need(rcond, dtype, decomposed):
    matrix = _second_moment(samples=5000)
    values, vectors = large_eigenpairs(matrix, rcond)
    assert [kind for _, kind in decomposed] == [dtype]
    reference = torch.linalg.eigvalsh(matrix.double())
    assert len(values) == int((reference > rcond * reference[-1]).sum())
    assert vectors.shape == (SIZE, len(values))
    error = matrix @ vectors - vectors * values
    assert float(error.norm()) < 1e-4 * float(matrix.norm())


def test_a_change_of_basis_is_symmetric_to_the_bit():
    matrix = _second_moment(samples=200)
    basis = torch.linalg.qr(torch.randn(SIZE, 40)).Q
    found = change_basis(matrix, basis)
    assert torch.equal(found, found.mT)
    expected = basis.double().mT @ matrix.double() @ basis.double()
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_nothing_inverts_to_nothing():
    inverse, support = pseudo_reciprocal(torch.ones(0, 3), rcond=0.0)
    assert inverse.shape == support.shape == (0, 3)


def test_the_state_of_the_generator_is_untouched():
    state = torch.get_rng_state()
    symmetric_power(_second_moment(samples=200), 0.5)
    assert torch.equal(torch.get_rng_state(), state)


def test_smaller_matrices_are_decomposed_in_float64(decomposed, monkeypatch):
    monkeypatch.setattr(linalg, "_SMALL", SIZE)
    matrix = _second_moment(samples=5000)
    expected = _reference_power(matrix, 0.5)
    decomposed.clear()
    root = symmetric_power(matrix, 0.5)
    assert (SIZE, torch.float64) in decomposed
    assert (SIZE, torch.float32) not in decomposed
    assert float((root - expected).norm() / expected.norm()) < 1e-7
