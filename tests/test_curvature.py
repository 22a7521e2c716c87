"""Every kind of curvature against the dense matrix it stands for."""

from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn

from lightning_fedfisher.curvature import Dense, Diagonal, Identity
from lightning_fedfisher.kronecker import (
    KINDS,
    EigenKronecker,
    Kronecker,
    LookupEigenKronecker,
    LookupKronecker,
)

SHAPE = (3, 4)
CPU = torch.device("cpu")
EXPONENTS = [0.5, 0.4, 1, 2]


def _factor(size, rank, generator):
    root = torch.randn(size, rank, dtype=torch.float64, generator=generator)
    return root @ root.T / rank


def _make(kind, singular=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = SHAPE
    if kind == "identity":
        return Identity(SHAPE)
    if kind == "diagonal":
        values = torch.rand(SHAPE, dtype=torch.float64, generator=generator) + 0.1
        return Diagonal(values * (torch.arange(columns) > 0 if singular else 1))
    if kind == "kronecker":
        less = 1 if singular else 0
        return Kronecker(
            _factor(rows, rows + 2 - 3 * less, generator),
            _factor(columns, columns + 2 - 4 * less, generator),
        )
    if kind == "lookup_kronecker":
        values = torch.rand(rows, dtype=torch.float64, generator=generator) + 0.1
        values[0] *= not singular
        return LookupKronecker(values, _factor(columns, 2 if singular else 6, generator))
    if "ekfac" in kind:
        spectrum = torch.rand(SHAPE, dtype=torch.float64, generator=generator) + 0.1
        spectrum[:, 0] *= not singular
        output_basis, input_basis = (
            torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
            for n in SHAPE
        )
        if kind == "ekfac":
            return EigenKronecker(output_basis, input_basis, spectrum)
        return LookupEigenKronecker(input_basis, spectrum)
    assert kind == "dense"
    return Dense(_factor(rows * columns, 5 if singular else 20, generator), SHAPE)


def _reference_dense(curvature):
    """What each kind means on a weight matrix flattened row by row."""
    if isinstance(curvature, Identity):
        return torch.eye(SHAPE[0] * SHAPE[1], dtype=torch.float64)
    if isinstance(curvature, Diagonal):
        return torch.diag(curvature.values.flatten())
    if isinstance(curvature, Kronecker):
        return torch.kron(curvature.output_factor, curvature.input_factor)
    if isinstance(curvature, LookupKronecker):
        return torch.kron(torch.diag(curvature.output_values), curvature.input_factor)
    if isinstance(curvature, EigenKronecker | LookupEigenKronecker):
        rows = torch.eye(SHAPE[0], dtype=curvature.spectrum.dtype)
        if isinstance(curvature, EigenKronecker):
            rows = curvature.output_basis
        basis = torch.kron(rows.contiguous(), curvature.input_basis.contiguous())
        return basis @ torch.diag(curvature.spectrum.flatten()) @ basis.T
    return curvature.matrix


def _reference_power(dense, exponent):
    values, vectors = torch.linalg.eigh(dense)
    powers = torch.where(values > 1e-10 * values.max(), values.abs() ** exponent, 0.0)
    return vectors @ torch.diag(powers) @ vectors.T


def _weights(seed=0):
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _close(actual, expected, tolerance=1e-12):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


every_kind = pytest.mark.parametrize("kind", KINDS)
singular_or_not = pytest.mark.parametrize("singular", [False, True], ids=["regular", "singular"])


def test_the_names_of_the_kinds_are_a_format():
    assert set(KINDS) == {
        "identity",
        "diagonal",
        "kronecker",
        "lookup_kronecker",
        "ekfac",
        "lookup_ekfac",
        "dense",
    }
    assert all(cls.kind == kind for kind, cls in KINDS.items())


@every_kind
@singular_or_not
def test_apply_diagonal_trace_and_dense(kind, singular):
    curvature = _make(kind, singular)
    expected, weights = _reference_dense(curvature), _weights()
    assert curvature.shape == SHAPE
    _close(curvature.apply(weights), (expected @ weights.flatten()).view(SHAPE))
    _close(curvature.dense().double(), expected)
    _close(curvature.diagonal().double(), expected.diagonal().view(SHAPE))
    _close(curvature.trace().double(), expected.trace())
    assert curvature.trace().ndim == 0


def test_a_row_major_weight_sees_the_output_factor_first():
    curvature = _make("kronecker")
    g, a = curvature.output_factor, curvature.input_factor
    _close(curvature.dense(), torch.kron(g, a))
    assert (curvature.dense() - torch.kron(a, g)).abs().max() > 0.1


def test_a_samples_gradient_is_the_kronecker_product_of_its_sides():
    torch.manual_seed(0)
    linear, x = nn.Linear(4, 3, bias=False).double(), torch.randn(4, dtype=torch.float64)
    direction = torch.randn(3, dtype=torch.float64)
    linear(x).backward(direction)
    gradient = linear.weight.grad.flatten()
    block = Kronecker(torch.outer(direction, direction), torch.outer(x, x))
    _close(block.dense(), torch.outer(gradient, gradient))


@every_kind
@singular_or_not
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_power(kind, singular, exponent):
    curvature = _make(kind, singular)
    powered = curvature.power(exponent)
    assert type(powered) is type(curvature)
    # A zero eigenvalue comes out of eigh as rounding, and 1e-16 ** 0.4 is 4e-7.
    tolerance = 1e-5 if singular and exponent < 1 else 1e-12
    expected = _reference_power(_reference_dense(curvature), exponent)
    _close(_reference_dense(powered), expected, tolerance)


@every_kind
@pytest.mark.parametrize(("first", "second"), [(0.5, 2), (0.4, 0.5), (2, 0.5)])
def test_powers_compose(kind, first, second):
    curvature = _make(kind)
    twice = _reference_dense(curvature.power(first).power(second))
    _close(twice, _reference_dense(curvature.power(first * second)), 1e-11)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_power_of_a_rank_one_matrix_is_finite(kind, dtype):
    # Its zero eigenvalues come out of eigh with either sign.
    vector = torch.linspace(1, 2, 12, dtype=dtype)
    rank_one = {
        "identity": lambda: Identity(SHAPE),
        "diagonal": lambda: Diagonal(torch.eye(12, dtype=dtype)[0].view(SHAPE) - 1e-9),
        "kronecker": lambda: Kronecker(
            torch.outer(vector[:3], vector[:3]), torch.outer(vector[:4], vector[:4])
        ),
        "lookup_kronecker": lambda: LookupKronecker(
            torch.tensor([1, 0, -1e-9], dtype=dtype), torch.outer(vector[:4], vector[:4])
        ),
        "ekfac": lambda: EigenKronecker(
            *(torch.eye(n, dtype=dtype) for n in SHAPE),
            torch.eye(12, dtype=dtype)[0].view(SHAPE) - 1e-9,
        ),
        "lookup_ekfac": lambda: LookupEigenKronecker(
            torch.eye(4, dtype=dtype), torch.eye(12, dtype=dtype)[0].view(SHAPE) - 1e-9
        ),
        "dense": lambda: Dense(torch.outer(vector, vector), SHAPE),
    }[kind]()
    for exponent in EXPONENTS:
        assert torch.isfinite(_reference_dense(rank_one.power(exponent))).all()


@every_kind
@pytest.mark.parametrize("exponent", [0, -0.5, float("nan")])
def test_powers_that_are_not_positive_are_refused(kind, exponent):
    with pytest.raises(ValueError, match="greater than 0"):
        _make(kind).power(exponent)


@every_kind
@singular_or_not
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_inverse(kind, singular, damping):
    curvature = _make(kind, singular)
    dense, weights = _reference_dense(curvature), _weights()
    largest = torch.linalg.eigvalsh(dense).max()
    damped = dense + damping * largest * torch.eye(len(dense), dtype=torch.float64)
    expected = torch.linalg.solve(damped, weights.flatten()).view(SHAPE)
    solve = curvature.inverse(damping)
    for _ in range(2):  # prepared once, used often
        _close(solve(weights), expected, 1e-11)


@every_kind
def test_inverse_without_damping(kind):
    curvature, weights = _make(kind), _weights()
    _close(curvature.apply(curvature.inverse(0.0)(weights)), weights, 1e-9)


@every_kind
def test_mean_averages_every_tensor(kind):
    curvatures, shares = [_make(kind, seed=seed) for seed in range(3)], [0.5, 0.3, 0.2]
    mean = KINDS[kind].mean(curvatures, shares)
    if "ekfac" in kind:
        # Bases cannot be averaged: the nearest Kronecker products are.
        curvatures = [curvature.kronecker() for curvature in curvatures]
    assert type(mean) is type(curvatures[0])
    assert mean.shape == SHAPE
    for name, tensor in mean.tensors().items():
        expected = sum(p * c.tensors()[name] for p, c in zip(shares, curvatures, strict=True))
        _close(tensor, expected)


@pytest.mark.parametrize("kind", ["kronecker", "lookup_kronecker"])
@singular_or_not
def test_an_eigendecomposition_is_the_same_operator(kind, singular):
    curvature = _make(kind, singular)
    turned = curvature.eigen()
    assert turned.kind == kind.replace("kronecker", "ekfac")
    _close(_reference_dense(turned), _reference_dense(curvature))


@pytest.mark.parametrize("kind", ["kronecker", "lookup_kronecker"])
def test_the_kronecker_product_of_an_eigendecomposition_is_the_first(kind):
    curvature = _make(kind)
    back = curvature.eigen().kronecker()
    assert type(back) is type(curvature)
    _close(_reference_dense(back), _reference_dense(curvature))


@pytest.mark.parametrize("kind", ["ekfac", "lookup_ekfac"])
@singular_or_not
def test_the_kronecker_product_of_a_spectrum_keeps_its_traces(kind, singular):
    curvature = _make(kind, singular)
    dense, product = (
        _reference_dense(c).view(*SHAPE, *SHAPE) for c in (curvature, curvature.kronecker())
    )
    for trace in ("iaja->ij", "aiaj->ij"):
        _close(torch.einsum(trace, product), torch.einsum(trace, dense))


def test_a_spectrum_of_zeros_has_a_kronecker_product_of_zeros():
    for kind in ("ekfac", "lookup_ekfac"):
        curvature = _make(kind)
        nothing = curvature.with_spectrum(torch.zeros(SHAPE, dtype=torch.float64)).kronecker()
        assert _reference_dense(nothing).abs().max() == 0


@pytest.mark.parametrize("kind", ["identity", "diagonal", "dense"])
def test_mean_is_the_weighted_sum_where_the_kind_is_linear(kind):
    curvatures, shares = [_make(kind, seed=seed) for seed in range(3)], [0.5, 0.3, 0.2]
    expected = sum(p * _reference_dense(c) for p, c in zip(shares, curvatures, strict=True))
    _close(_reference_dense(KINDS[kind].mean(curvatures, shares)), expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "ekfac" not in kind])
def test_mean_of_one_is_itself(kind):
    curvature = _make(kind)
    mean = KINDS[kind].mean([curvature, curvature], [0.25, 0.75])
    _close(_reference_dense(mean), _reference_dense(curvature))


@every_kind
def test_tensors_round_trip(kind):
    curvature = _make(kind)
    tensors = curvature.tensors()
    expected = KINDS[kind].tensor_shapes(SHAPE)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    again = KINDS[kind].from_tensors(tensors, SHAPE)
    assert again.shape == SHAPE
    assert torch.equal(_reference_dense(again), _reference_dense(curvature))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "identity"])
def test_from_tensors_refuses_what_does_not_fit(kind):
    tensors = _make(kind).tensors()
    name = next(iter(tensors))
    missing = {other: tensor for other, tensor in tensors.items() if other != name}
    for wrong in (
        missing,
        tensors | {"surplus": torch.ones(1)},
        tensors | {name: tensors[name][:-1]},
        tensors | {name: tensors[name].unsqueeze(0)},
    ):
        with pytest.raises(ValueError, match=f"{kind} curvature of a .* needs tensors of shapes"):
            KINDS[kind].from_tensors(wrong, SHAPE)
    with pytest.raises(ValueError, match="needs tensors"):
        KINDS[kind].from_tensors(tensors, (SHAPE[0], SHAPE[1] + 1))


def test_identity_has_no_tensors():
    with pytest.raises(ValueError, match="identity curvature"):
        Identity.from_tensors({"values": torch.ones(SHAPE)}, SHAPE)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_to_changes_every_tensor(kind, dtype):
    curvature = _make(kind)
    moved = curvature.to(CPU, dtype)
    assert type(moved) is type(curvature)
    assert moved.shape == SHAPE
    for name, tensor in moved.tensors().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, curvature.tensors()[name].to(dtype))
        assert curvature.tensors()[name].dtype == torch.float64


@every_kind
def test_elementwise_means_that_the_dense_matrix_is_diagonal(kind):
    dense = _reference_dense(_make(kind))
    assert KINDS[kind].elementwise == torch.equal(dense, torch.diag(dense.diagonal()))


@every_kind
def test_kinds_are_frozen_and_pure(kind):
    curvature = _make(kind)
    before = {name: tensor.clone() for name, tensor in curvature.tensors().items()}
    weights = _weights()
    curvature.apply(weights)
    curvature.power(0.5)
    curvature.inverse(0.1)(weights)
    curvature.dense()
    KINDS[kind].mean([curvature, curvature], [0.5, 0.5])
    assert torch.equal(weights, _weights())
    for name, tensor in curvature.tensors().items():
        assert torch.equal(tensor, before[name])
    field = "size" if kind == "identity" else next(iter(before))
    with pytest.raises(FrozenInstanceError):
        setattr(curvature, field, None)
