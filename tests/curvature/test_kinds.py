"""Every kind of curvature against the dense matrix it stands for."""

import weakref
from dataclasses import FrozenInstanceError
from typing import get_args

import pytest
import torch
from torch import nn

from lightning_fedfisher.curvature.base import Identity
from lightning_fedfisher.curvature.convolution import ConvolutionKronecker
from lightning_fedfisher.curvature.dense import Dense
from lightning_fedfisher.curvature.diagonal import Diagonal
from lightning_fedfisher.curvature.embedding import EmbeddingEigenKronecker, EmbeddingKronecker
from lightning_fedfisher.curvature.input_gram import InputGram
from lightning_fedfisher.curvature.input_map import InputMap
from lightning_fedfisher.curvature.kronecker import (
    EigenKronecker,
    Kronecker,
    TransposedEigenKronecker,
    TransposedKronecker,
)
from lightning_fedfisher.curvature.powers import symmetric_power
from lightning_fedfisher.curvature.registry import KINDS, KINDS_OF, CurvatureType

SHAPE = (3, 4)
KERNELS = {"convolution_kronecker": 2}  # elements; one for every other kind
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
    if kind == "input_gram":
        return InputGram(_factor(columns, 2 if singular else 6, generator), rows)
    if kind in ("kronecker", "transposed_kronecker"):
        less = 1 if singular else 0
        return KINDS[kind](
            _factor(rows, rows + 2 - 3 * less, generator),
            _factor(columns, columns + 2 - 4 * less, generator),
        )
    if kind == "convolution_kronecker":
        less = 1 if singular else 0
        return ConvolutionKronecker(
            _factor(rows, rows + 2 - 3 * less, generator),
            _factor(2, 4 - 3 * less, generator),
            _factor(2, 4, generator),
        )
    if kind == "embedding_kronecker":
        values = torch.rand(rows, dtype=torch.float64, generator=generator) + 0.1
        values[0] *= not singular
        return EmbeddingKronecker(values, _factor(columns, 2 if singular else 6, generator))
    if "ekfac" in kind:
        spectrum = torch.rand(SHAPE, dtype=torch.float64, generator=generator) + 0.1
        spectrum[:, 0] *= not singular
        row_basis, column_basis = (
            torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
            for n in SHAPE
        )
        if kind in ("ekfac", "transposed_ekfac"):
            return KINDS[kind](row_basis, column_basis, spectrum)
        return EmbeddingEigenKronecker(column_basis, spectrum)
    assert kind == "dense"
    return Dense(_factor(rows * columns, 5 if singular else 20, generator), SHAPE)


def _reference_dense(curvature):
    """What each kind means on a weight matrix flattened row by row."""
    if isinstance(curvature, Identity):
        return torch.eye(SHAPE[0] * SHAPE[1], dtype=torch.float64)
    if isinstance(curvature, Diagonal):
        return torch.diag(curvature.values.flatten())
    if isinstance(curvature, InputGram):
        rows = torch.eye(curvature.rows).to(curvature.column_factor)
        return torch.kron(rows, curvature.column_factor)
    if isinstance(curvature, Kronecker):
        return torch.kron(curvature.row_factor, curvature.column_factor)
    if isinstance(curvature, ConvolutionKronecker):
        columns = torch.kron(curvature.channel_factor, curvature.kernel_factor)
        ones = torch.ones(int(curvature.has_bias), int(curvature.has_bias)).to(columns)
        return torch.kron(curvature.row_factor, torch.block_diag(columns, ones))
    if isinstance(curvature, EmbeddingKronecker):
        return torch.kron(torch.diag(curvature.row_values), curvature.column_factor)
    if isinstance(curvature, EigenKronecker | EmbeddingEigenKronecker):
        rows = torch.eye(SHAPE[0], dtype=curvature.spectrum.dtype)
        if isinstance(curvature, EigenKronecker):
            rows = curvature.row_basis
        basis = torch.kron(rows.contiguous(), curvature.column_basis.contiguous())
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
        "input_gram",
        "kronecker",
        "transposed_kronecker",
        "convolution_kronecker",
        "embedding_kronecker",
        "ekfac",
        "transposed_ekfac",
        "embedding_ekfac",
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


@every_kind
@singular_or_not
def test_eigenvalues_and_norm_are_those_of_the_dense_matrix(kind, singular):
    curvature = _make(kind, singular)
    expected = torch.linalg.eigvalsh(_reference_dense(curvature))
    found = curvature.eigenvalues()
    assert found.shape == SHAPE
    _close(found.to(expected).flatten().sort().values, expected.clamp_min(0))
    _close(curvature.norm(), _reference_dense(curvature).square().sum().sqrt())


@every_kind
def test_the_norm_of_what_float32_cannot_square_is_finite(kind):
    curvature = _make(kind).to(CPU, torch.float32)
    tensors = {
        name: tensor if KINDS[kind].tensor_roles[name] == "basis" else tensor * 1e15
        for name, tensor in curvature.tensors().items()
    }
    times = 1e15 ** sum(form != "basis" for form in KINDS[kind].tensor_roles.values())
    large = KINDS[kind].from_tensors(tensors, SHAPE, KERNELS.get(kind, 1)).norm()
    _close(large, curvature.norm() * times, 1e-6)


def test_a_row_major_weight_sees_the_output_factor_first():
    curvature = _make("kronecker")
    g, a = curvature.row_factor, curvature.column_factor
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
        "input_gram": lambda: InputGram(torch.outer(vector[:4], vector[:4]), rows=3),
        "kronecker": lambda: Kronecker(
            torch.outer(vector[:3], vector[:3]), torch.outer(vector[:4], vector[:4])
        ),
        "transposed_kronecker": lambda: TransposedKronecker(
            torch.outer(vector[:3], vector[:3]), torch.outer(vector[:4], vector[:4])
        ),
        "transposed_ekfac": lambda: TransposedEigenKronecker(
            *(torch.eye(n, dtype=dtype) for n in SHAPE),
            torch.eye(12, dtype=dtype)[0].view(SHAPE) - 1e-9,
        ),
        "convolution_kronecker": lambda: ConvolutionKronecker(
            *(torch.outer(vector[:n], vector[:n]) for n in (3, 2, 2))
        ),
        "embedding_kronecker": lambda: EmbeddingKronecker(
            torch.tensor([1, 0, -1e-9], dtype=dtype), torch.outer(vector[:4], vector[:4])
        ),
        "ekfac": lambda: EigenKronecker(
            *(torch.eye(n, dtype=dtype) for n in SHAPE),
            torch.eye(12, dtype=dtype)[0].view(SHAPE) - 1e-9,
        ),
        "embedding_ekfac": lambda: EmbeddingEigenKronecker(
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
def test_pseudo_inverse(kind, singular):
    curvature, weights = _make(kind, singular), _weights()
    dense = _reference_dense(curvature)
    values = torch.linalg.eigvalsh(dense) / torch.linalg.eigvalsh(dense).max()
    assert not ((values > 1e-13) & (values < 1e-4)).any()  # the zeros are clear
    assert (values.abs() < 1e-13).any() == (singular and kind != "identity")
    inverse = torch.linalg.pinv(dense, rtol=1e-9, hermitian=True)
    prepared = curvature.pseudo_inverse(1e-9)
    for _ in range(2):  # prepared once, used often
        _close(prepared.solve(weights), (inverse @ weights.flatten()).view(SHAPE), 1e-10)
        _close(prepared.project(weights), (dense @ inverse @ weights.flatten()).view(SHAPE), 1e-10)


@every_kind
@singular_or_not
def test_project_is_the_projector_on_what_is_not_cut(kind, singular):
    curvature = _make(kind, singular)
    project = curvature.pseudo_inverse(1e-9).project
    basis = torch.eye(12, dtype=torch.float64)
    matrix = torch.stack([project(row.view(SHAPE)).flatten() for row in basis], dim=1)
    _close(matrix @ matrix, matrix, 1e-12)
    _close(matrix.T, matrix, 1e-12)
    dense = _reference_dense(curvature)
    _close(matrix @ dense, dense, 1e-12)
    rank = int(torch.linalg.matrix_rank(dense, rtol=1e-9, hermitian=True))
    assert float(matrix.trace()) == pytest.approx(rank)


@every_kind
@singular_or_not
def test_pseudo_inverse_without_a_cut_inverts_what_rounding_left(kind, singular):
    curvature, weights = _make(kind, singular), _weights()
    inverted = curvature.pseudo_inverse(0.0).solve(weights)
    assert torch.isfinite(inverted).all()
    if not singular:
        _close((_reference_dense(curvature) @ inverted.flatten()).view(SHAPE), weights, 1e-9)


@every_kind
def test_pseudo_inverse_of_nothing_is_nothing(kind):
    if kind == "identity":
        return
    tensors = {name: torch.zeros_like(t) for name, t in _make(kind).tensors().items()}
    nothing = KINDS[kind].from_tensors(tensors, SHAPE, KERNELS.get(kind, 1))
    prepared = nothing.pseudo_inverse(1e-6)
    assert torch.equal(prepared.solve(_weights()), torch.zeros(SHAPE, dtype=torch.float64))
    assert torch.equal(prepared.project(_weights()), torch.zeros(SHAPE, dtype=torch.float64))


def _spectral(values, seed=0):
    """A symmetric matrix of the given eigenvalues, and its eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(values, dtype=torch.float64)
    size = len(values)
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q
    return basis @ torch.diag(values) @ basis.T, basis


@pytest.mark.parametrize("lookup", [False, True], ids=["kronecker", "embedding_kronecker"])
def test_kronecker_factors_are_cut_each_by_itself(lookup):
    # 0.01 * 0.1 is below the cut in the product but not in either factor; 1e-4 is in its own.
    outputs, inputs = [1.0, 0.01, 1e-4], [3.0, 0.03, 0.3, 3e-4]
    column_factor, column_basis = _spectral(inputs, 1)
    row_factor, row_basis = _spectral(outputs, 2)
    if lookup:
        row_basis = torch.eye(3, dtype=torch.float64)
        curvature = EmbeddingKronecker(torch.tensor(outputs, dtype=torch.float64), column_factor)
    else:
        curvature = Kronecker(row_factor, column_factor)
    kept = torch.outer(torch.tensor([1.0, 1, 0]), torch.tensor([1.0, 1, 1, 0])).double()
    products = torch.outer(
        torch.tensor(outputs, dtype=torch.float64), torch.tensor(inputs, dtype=torch.float64)
    )
    basis = torch.kron(row_basis.contiguous(), column_basis.contiguous())
    inverse = basis @ torch.diag((kept / products).flatten()) @ basis.T
    projector = basis @ torch.diag(kept.flatten()) @ basis.T
    prepared, weights = curvature.pseudo_inverse(2e-3), _weights()
    _close(prepared.solve(weights), (inverse @ weights.flatten()).view(SHAPE), 1e-8)
    _close(prepared.project(weights), (projector @ weights.flatten()).view(SHAPE), 1e-8)
    # Of another kind the operator has one spectrum, and that is cut.
    whole = Dense(_reference_dense(curvature), SHAPE).pseudo_inverse(2e-3).project(weights)
    spectral = curvature.eigendecompose().pseudo_inverse(2e-3).project(weights)
    above = basis @ torch.diag((products > 2e-3 * 3).double().flatten()) @ basis.T
    _close(whole, (above @ weights.flatten()).view(SHAPE), 1e-8)
    _close(spectral, whole, 1e-8)


def _partial_traces(dense):
    """Over the inputs, which leaves the outputs, and over the outputs."""
    blocks = dense.reshape(*SHAPE, *SHAPE)
    return torch.einsum("iaja->ij", blocks), torch.einsum("iaib->ab", blocks)


@every_kind
@singular_or_not
def test_over_outputs_is_the_partial_trace(kind, singular):
    curvature = _make(kind, singular)
    rows = curvature.average_over_columns()
    dense = _reference_dense(curvature)
    outputs, _ = _partial_traces(dense)
    if kind in ("diagonal", "input_gram", "embedding_kronecker", "embedding_ekfac"):
        assert torch.count_nonzero(outputs - torch.diag(outputs.diagonal())) == 0
    expected = torch.kron(outputs, torch.eye(SHAPE[1], dtype=torch.float64) / SHAPE[1])
    assert type(rows) is type(curvature)
    assert rows.shape == SHAPE
    _close(_reference_dense(rows), expected)
    _close(rows.trace().double(), dense.trace())
    if kind != "identity":
        assert (expected - dense).abs().max() > 0.01
    _close(_reference_dense(rows.average_over_columns()), expected)


@every_kind
def test_what_has_been_averaged_stays_so_under_powers(kind):
    rows = _make(kind).average_over_columns()
    powered = rows.power(0.5)
    expected = _reference_power(_reference_dense(rows), 0.5)
    _close(_reference_dense(powered), expected, 1e-11)
    _close(_reference_dense(powered.average_over_columns()), expected, 1e-11)


def test_powers_and_averages_over_outputs_are_not_to_be_exchanged():
    # The mean of roots is not the root of the mean, but for a spectrum alike in all inputs.
    for kind in KINDS.keys() - {"identity"}:
        curvature = _make(kind)
        first = _reference_dense(curvature.average_over_columns().power(0.5))
        last = _reference_dense(curvature.power(0.5).average_over_columns())
        assert (first - last).abs().max() > 1e-3


@every_kind
@singular_or_not
def test_of_inputs_keeps_the_inputs_alone(kind, singular):
    curvature = _make(kind, singular)
    inputs = curvature.of_inputs()
    assert inputs.shape == SHAPE
    rows, columns = (torch.eye(size, dtype=torch.float64) for size in SHAPE)
    if kind == "input_gram":
        expected = _reference_dense(curvature)
        assert type(inputs) is InputGram
    elif kind == "kronecker":
        expected = torch.kron(rows, curvature.column_factor)
        # By the definition alone: the moment of the inputs, up to a scale.
        _, traced = _partial_traces(_reference_dense(curvature))
        traced = traced / curvature.row_factor.trace()
        _close(_reference_dense(inputs), torch.kron(rows, traced))
        assert type(inputs) is InputGram
    elif kind == "convolution_kronecker":
        _, traced = _partial_traces(_reference_dense(curvature))
        expected = torch.kron(rows, traced / curvature.row_factor.trace())
        assert type(inputs) is ConvolutionKronecker
    elif kind == "transposed_kronecker":
        expected = torch.kron(curvature.row_factor, columns)
        traced, _ = _partial_traces(_reference_dense(curvature))
        traced = traced / curvature.column_factor.trace()
        _close(_reference_dense(inputs), torch.kron(traced, columns))
        assert type(inputs) is TransposedKronecker
    elif kind == "transposed_ekfac":
        traced, _ = _partial_traces(_reference_dense(curvature))
        expected = torch.kron(traced / columns.shape[0], columns)
        assert type(inputs) is TransposedKronecker
    elif kind == "embedding_kronecker":
        expected = torch.kron(torch.diag(curvature.row_values), columns)
        assert type(inputs) is EmbeddingKronecker
    elif kind == "ekfac":
        # That of the Kronecker product with the same traces.
        _, traced = _partial_traces(_reference_dense(curvature))
        expected = torch.kron(rows, traced * columns.shape[0] / traced.trace())
        assert type(inputs) is InputGram
    else:
        expected = torch.kron(rows, columns)
        assert type(inputs) is Identity
    _close(_reference_dense(inputs), expected)
    assert all(tensor.dtype == torch.float64 for tensor in inputs.tensors().values())


@every_kind
@singular_or_not
@pytest.mark.parametrize(("units", "bias"), [(1, 0), (2, 0), (4, 0), (1, 1), (3, 1)])
def test_with_inputs_is_the_operator_for_other_inputs(kind, singular, units, bias):
    generator = torch.Generator().manual_seed(5)
    between = torch.randn(units, units, dtype=torch.float64, generator=generator)
    curvature, inputs = _make(kind, singular), SHAPE[1] - bias
    change = InputMap(between, inputs)
    if kind == "convolution_kronecker" and bias:
        return  # three inputs are no channels of two elements
    if kind not in ("input_gram", "kronecker", "convolution_kronecker", "ekfac"):
        assert curvature.inputs_on != "columns"
        with pytest.raises(TypeError, match=f"{kind} curvature .* on its columns"):
            curvature.with_inputs(change)
        return
    assert curvature.inputs_on == "columns"
    found = curvature.with_inputs(change)
    stays = kind != "convolution_kronecker" or units == len(curvature.channel_factor)
    assert type(found) is (type(curvature) if stays else Kronecker)
    # Positions of a block go together, and the bias stays: I x (S x I + 1).
    blocks = torch.kron(between, torch.eye(inputs // units, dtype=torch.float64))
    columns = torch.block_diag(blocks, torch.eye(int(bias), dtype=torch.float64))
    wide = torch.kron(torch.eye(SHAPE[0], dtype=torch.float64), columns)
    expected = wide @ _reference_dense(curvature) @ wide.T
    weights = _weights()
    _close(_reference_dense(found), expected)
    _close(found.apply(weights), (expected @ weights.flatten()).view(SHAPE))
    _close(found.diagonal(), expected.diagonal().view(SHAPE))


@every_kind
def test_mean_goes_through_a_generator_once_and_one_at_a_time(kind):
    client_weights, alive, most = [0.5, 0.3, 0.2], [], []

    def read():
        for seed in range(3):
            curvature = _make(kind, seed=seed)
            alive.append(weakref.ref(curvature))
            most.append(sum(ref() is not None for ref in alive))
            yield curvature
            del curvature

    expected = KINDS[kind].mean([_make(kind, seed=seed) for seed in range(3)], client_weights)
    mean = KINDS[kind].mean(read(), client_weights)
    assert len(alive) == 3  # a generator that was begun twice would have been empty
    assert max(most) <= 2  # the one just read and the one about to go
    assert torch.equal(_reference_dense(mean), _reference_dense(expected))


@every_kind
@pytest.mark.parametrize("clients", [2, 4])
def test_mean_needs_a_share_for_each(kind, clients):
    with pytest.raises(ValueError, match="argument"):
        KINDS[kind].mean((_make(kind) for _ in range(clients)), [0.5, 0.3, 0.2])


@every_kind
def test_mean_averages_every_tensor(kind):
    curvatures, client_weights = [_make(kind, seed=seed) for seed in range(3)], [0.5, 0.3, 0.2]
    mean = KINDS[kind].mean(curvatures, client_weights)
    if "ekfac" in kind:
        # Bases cannot be averaged: the nearest Kronecker products are.
        curvatures = [curvature.kronecker() for curvature in curvatures]
    assert type(mean) is type(curvatures[0])
    assert mean.shape == SHAPE
    for name, tensor in mean.tensors().items():
        expected = sum(
            p * c.tensors()[name] for p, c in zip(client_weights, curvatures, strict=True)
        )
        _close(tensor, expected)


@pytest.mark.parametrize("kind", ["kronecker", "embedding_kronecker"])
@singular_or_not
def test_an_eigendecomposition_is_the_same_operator(kind, singular):
    curvature = _make(kind, singular)
    turned = curvature.eigendecompose()
    assert turned.kind == kind.replace("kronecker", "ekfac")
    _close(_reference_dense(turned), _reference_dense(curvature))


@pytest.mark.parametrize("kind", ["kronecker", "embedding_kronecker"])
def test_the_kronecker_product_of_an_eigendecomposition_is_the_first(kind):
    curvature = _make(kind)
    back = curvature.eigendecompose().kronecker()
    assert type(back) is type(curvature)
    _close(_reference_dense(back), _reference_dense(curvature))


@pytest.mark.parametrize("kind", ["ekfac", "embedding_ekfac"])
@singular_or_not
def test_the_kronecker_product_of_a_spectrum_keeps_its_traces(kind, singular):
    curvature = _make(kind, singular)
    dense, product = (
        _reference_dense(c).view(*SHAPE, *SHAPE) for c in (curvature, curvature.kronecker())
    )
    for trace in ("iaja->ij", "aiaj->ij"):
        _close(torch.einsum(trace, product), torch.einsum(trace, dense))


def test_a_spectrum_of_zeros_has_a_kronecker_product_of_zeros():
    for kind in ("ekfac", "embedding_ekfac"):
        curvature = _make(kind)
        nothing = curvature.with_spectrum(torch.zeros(SHAPE, dtype=torch.float64)).kronecker()
        assert _reference_dense(nothing).abs().max() == 0


@pytest.mark.parametrize("kind", ["identity", "diagonal", "input_gram", "dense"])
def test_mean_is_the_weighted_sum_where_the_kind_is_linear(kind):
    curvatures, client_weights = [_make(kind, seed=seed) for seed in range(3)], [0.5, 0.3, 0.2]
    expected = sum(p * _reference_dense(c) for p, c in zip(client_weights, curvatures, strict=True))
    _close(_reference_dense(KINDS[kind].mean(curvatures, client_weights)), expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "ekfac" not in kind])
def test_mean_of_one_is_itself(kind):
    curvature = _make(kind)
    mean = KINDS[kind].mean([curvature, curvature], [0.25, 0.75])
    _close(_reference_dense(mean), _reference_dense(curvature))


@every_kind
def test_tensors_round_trip(kind):
    curvature = _make(kind)
    tensors = curvature.tensors()
    expected = KINDS[kind].tensor_shapes(SHAPE, KERNELS.get(kind, 1))
    assert curvature.kernel == KERNELS.get(kind, 1)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    again = KINDS[kind].from_tensors(tensors, SHAPE, KERNELS.get(kind, 1))
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
            KINDS[kind].from_tensors(wrong, SHAPE, KERNELS.get(kind, 1))
    more = 1 + (kind in KERNELS)  # one more column than inputs is a bias
    with pytest.raises(ValueError, match=r"needs tensors|no channels of 2 elements"):
        KINDS[kind].from_tensors(tensors, (SHAPE[0], SHAPE[1] + more), KERNELS.get(kind, 1))


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
    prepared = curvature.pseudo_inverse(0.1)
    prepared.solve(weights)
    prepared.project(weights)
    curvature.average_over_columns()
    curvature.of_inputs()
    curvature.dense()
    KINDS[kind].mean([curvature, curvature], [0.5, 0.5])
    assert torch.equal(weights, _weights())
    for name, tensor in curvature.tensors().items():
        assert torch.equal(tensor, before[name])
    field = "size" if kind == "identity" else next(iter(before))
    with pytest.raises(FrozenInstanceError):
        setattr(curvature, field, None)


def test_what_can_be_asked_for_has_kinds():
    assert set(get_args(CurvatureType)) == KINDS_OF.keys()
    assert {kind for kinds in KINDS_OF.values() for kind in kinds} == KINDS.keys()


def test_the_power_of_a_factor_that_is_symmetric_up_to_rounding_only():
    # As a stranger may send it: each row is coupled to the next, and none to the one before.
    size = 1500
    matrix = torch.eye(size) + torch.diag(torch.full((size - 1,), 1e-6), 1)
    power = symmetric_power(matrix, 0.5)
    torch.testing.assert_close(power, torch.eye(size), atol=1e-5, rtol=0)


OUTPUTS = {
    "kronecker": "row_factor",
    "transposed_kronecker": "column_factor",
    "convolution_kronecker": "row_factor",
    "embedding_kronecker": "column_factor",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exponent", [0.5, 1, 2])
def test_damping_adds_to_the_factor_over_the_outputs_alone(kind, exponent):
    curvature = _make(kind, singular=True)
    found = curvature.power(exponent, damping=0.3)
    assert OUTPUTS.get(kind, "") == type(curvature).outputs_factor
    name = type(curvature).outputs_factor
    if name:
        factor = curvature.tensors()[name]
        more = factor + 0.3 * factor.diagonal().mean() * torch.eye(len(factor)).to(factor)
        curvature = curvature.with_tensors({name: more})
        assert not torch.equal(more, factor)
    expected = curvature.power(exponent).dense()
    torch.testing.assert_close(found.dense(), expected, rtol=1e-7, atol=1e-7)


INPUTS = {
    "input_gram": "column_factor",
    "kronecker": "column_factor",
    "transposed_kronecker": "row_factor",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_factor_over_the_inputs_has_a_power_of_its_own(kind):
    curvature = _make(kind)
    found = curvature.power(0.5, inputs_exponent=1.5)
    assert INPUTS.get(kind, "") == type(curvature).inputs_factor
    expected = curvature.power(0.5)
    if name := INPUTS.get(kind):
        other = curvature.power(1.5).tensors()[name]
        assert not torch.allclose(other, expected.tensors()[name])
        expected = expected.with_tensors({name: other})
    torch.testing.assert_close(found.dense(), expected.dense(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="must be greater than 0, got 0"):
        curvature.power(0.5, inputs_exponent=0)


def test_outputs_without_a_gradient_are_not_damped():
    factor = torch.tensor([[4.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    found = Kronecker(factor, torch.eye(1)).power(2, damping=0.5)
    seen = factor[:2, :2] + 0.5 * 3.0 * torch.eye(2)
    torch.testing.assert_close(found.row_factor[:2, :2], seen @ seen)
    assert not found.row_factor[2].any()
