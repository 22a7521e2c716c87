"""Powers of large matrices, in float32 against float64."""

import pytest
import torch
from helpers.second_moments import SIZE, reference_power, second_moment

from lightning_fedfisher.curvature import linalg
from lightning_fedfisher.curvature.powers import power_of_root, symmetric_power

pytestmark = pytest.mark.usefixtures("large")


def test_the_root_of_a_regular_matrix_is_as_exact_as_float32(decomposed):
    matrix = second_moment(samples=5000)
    expected = reference_power(matrix, 0.5)
    decomposed.clear()
    root = symmetric_power(matrix, 0.5)
    assert root.dtype == torch.float32
    assert torch.equal(root, root.mT)
    assert float((root - expected).norm() / expected.norm()) < 5e-6
    assert [dtype for size, dtype in decomposed if size == SIZE] == [torch.float32]


def test_small_eigenvalues_keep_their_digits_beside_a_large_mean():
    """What a plain decomposition in float32 loses: it rounds by the largest eigenvalue."""
    matrix = second_moment(samples=5000)
    expected = reference_power(matrix, 0.5)
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
    matrix = second_moment(samples)
    expected = reference_power(second_moment(samples, torch.float64), exponent)
    error = float((symmetric_power(matrix, exponent) - expected).norm() / expected.norm())
    # The power of float32's rounding, in directions that the samples do not have.
    rounding = reference_power(matrix, exponent) - expected
    assert error < 1.1 * float(rounding.norm() / expected.norm())


def test_the_power_of_a_matrix_of_low_rank_is_found_from_a_root_of_as_many_rows(decomposed):
    matrix = second_moment(samples=200)
    expected = reference_power(second_moment(samples=200, dtype=torch.float64), 0.5)
    decomposed.clear()
    root = symmetric_power(matrix, 0.5)
    assert max(size for size, _ in decomposed) == 200
    assert root.dtype == torch.float32
    assert torch.equal(root, root.mT)
    assert float((root - expected).norm() / expected.norm()) < 1e-5
    # Its square is the matrix, to what float32 holds of it.
    assert float((root.double() @ root.double() - matrix).norm() / matrix.norm()) < 1e-6


def test_rows_that_are_zero_stay_zero():
    matrix = second_moment(samples=5000)
    dead = torch.arange(SIZE) % 10 == 3
    matrix[dead] = matrix[:, dead] = 0
    root = symmetric_power(matrix, 0.5)
    assert not root[dead].any()
    assert not root[:, dead].any()
    expected = reference_power(matrix, 0.5)
    assert float((root - expected).norm() / expected.norm()) < 5e-6


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30])
def test_faint_and_huge_matrices_are_decomposed_in_float64(scale, decomposed):
    matrix = (second_moment(samples=5000).double() * scale).float()
    expected = reference_power(matrix, 0.5)
    decomposed.clear()
    root = symmetric_power(matrix, 0.5)
    assert float((root - expected).norm() / expected.norm()) < 5e-6
    assert (SIZE, torch.float64) in decomposed


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30])
def test_faint_and_huge_matrices_of_low_rank_have_their_power(scale):
    matrix = (second_moment(samples=200, dtype=torch.float64) * scale).float()
    expected = reference_power(second_moment(samples=200, dtype=torch.float64), 0.5)
    error = symmetric_power(matrix, 0.5).double() / scale**0.5 - expected
    assert float(error.norm() / expected.norm()) < 1e-4


def test_the_state_of_the_generator_is_untouched():
    state = torch.get_rng_state()
    symmetric_power(second_moment(samples=200), 0.5)
    assert torch.equal(torch.get_rng_state(), state)


def test_smaller_matrices_are_decomposed_in_float64(decomposed, monkeypatch):
    monkeypatch.setattr(linalg, "_SMALL", SIZE)
    matrix = second_moment(samples=5000)
    expected = reference_power(matrix, 0.5)
    decomposed.clear()
    root = symmetric_power(matrix, 0.5)
    assert (SIZE, torch.float64) in decomposed
    assert (SIZE, torch.float32) not in decomposed
    assert float((root - expected).norm() / expected.norm()) < 1e-7


@pytest.mark.parametrize(
    ("exponent", "scale"), [(0.5, 1e-19), (0.5, 1e18), (0.25, 1e-19), (0.25, 1.0), (2.0, 1.0)]
)
def test_the_power_of_a_root_is_found_in_float32_at_any_scale(exponent, scale, decomposed):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(300, SIZE, generator=generator) * torch.logspace(0, -3, 300).unsqueeze(1)
    expected = reference_power((root.double().mT @ root.double()), exponent)
    decomposed.clear()
    found = power_of_root(root * scale, exponent).double() / scale ** (2 * exponent)
    assert decomposed == [(300, torch.float64)]  # small
    error = float((found - expected).norm() / expected.norm())
    assert error < (1e-5 if exponent >= 0.5 else 1e-3)  # which lifts small values out of rounding


def test_large_roots_are_decomposed_in_float32(decomposed, monkeypatch):
    monkeypatch.setattr(linalg, "_SMALL", 100)
    root = torch.randn(300, SIZE, generator=torch.Generator().manual_seed(0))
    expected = reference_power((root.double().mT @ root.double()), 0.5)
    decomposed.clear()
    found = power_of_root(root, 0.5)
    assert decomposed == [(300, torch.float32)]
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("last", ["a copy of the first", "one faint entry"])
@pytest.mark.parametrize("seed", range(20))
def test_rows_that_add_nothing_to_a_tail_leave_it_finite(last, seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(7, 40, generator=generator)
    root[-1] = root[0] if last == "a copy of the first" else 1e-5 * (torch.arange(40) == 3)
    tail = 0.3 * float(torch.rand(1, generator=generator))
    matrix = root.double().mT @ root.double() + tail * torch.eye(40)
    expected = reference_power(matrix, 0.5)
    assert float((power_of_root(root, 0.5, tail) - expected).norm() / expected.norm()) < 1e-5


def test_a_root_of_a_singular_matrix_leaves_its_null_space_alone():
    """As the default method needs, which takes a thousandth of the largest for nothing."""
    for size, samples, mean in ((300, 150, 3.0), (500, 250, 10.0), (500, 499, 3.0)):
        generator = torch.Generator().manual_seed(0)
        root = (mean + torch.randn(samples, size, generator=generator)) / samples**0.5
        values, basis = torch.linalg.eigh(root.double().mT @ root.double())
        null = basis[:, : size - samples]
        found = power_of_root(root, 0.5).double()
        assert float(torch.linalg.matrix_norm(null.mT @ found @ null, 2)) < 1e-5 * values[-1].sqrt()
