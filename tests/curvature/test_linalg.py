"""Eigenpairs of large matrices, in float32 against float64."""

import pytest
import torch
from helpers.second_moments import SIZE, reference_power, second_moment

from lightning_fedfisher.curvature.linalg import (
    change_basis,
    large_eigenpairs,
    pseudo_reciprocal,
    symmetric_eigendecomposition,
)
from lightning_fedfisher.curvature.powers import symmetric_power

pytestmark = pytest.mark.usefixtures("large")


def test_what_float32_does_not_reproduce_is_decomposed_in_float64(monkeypatch):
    matrix, original = second_moment(samples=5000), torch.linalg.eigh
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
    reference = reference_power(matrix, 0.5)
    assert float((root - reference).norm() / reference.norm()) < 5e-6


@pytest.mark.parametrize(("rcond", "dtype"), [(1e-3, torch.float32), (1e-6, torch.float64)])
def test_large_eigenpairs_are_found_in_the_precision_they_need(rcond, dtype, decomposed):
    matrix = second_moment(samples=5000)
    values, vectors = large_eigenpairs(matrix, rcond)
    assert [kind for _, kind in decomposed] == [dtype]
    reference = torch.linalg.eigvalsh(matrix.double())
    assert len(values) == int((reference > rcond * reference[-1]).sum())
    assert vectors.shape == (SIZE, len(values))
    error = matrix @ vectors - vectors * values
    assert float(error.norm()) < 1e-4 * float(matrix.norm())


def test_a_change_of_basis_is_symmetric_to_the_bit():
    matrix = second_moment(samples=200)
    basis = torch.linalg.qr(torch.randn(SIZE, 40)).Q
    found = change_basis(matrix, basis)
    assert torch.equal(found, found.mT)
    expected = basis.double().mT @ matrix.double() @ basis.double()
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_nothing_inverts_to_nothing():
    inverse, support = pseudo_reciprocal(torch.ones(0, 3), rcond=0.0)
    assert inverse.shape == support.shape == (0, 3)
