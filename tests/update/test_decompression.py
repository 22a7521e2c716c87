"""Restored tensors, and powers of them, against what was packed; and bytes that cannot be."""

import math

import pytest
import torch
from helpers.second_moments import reference_power

from lightning_fedfisher.curvature.diagonal import Diagonal
from lightning_fedfisher.curvature.kronecker import Kronecker
from lightning_fedfisher.layers import find_layers
from lightning_fedfisher.update import ClientUpdate, UpdateHeader
from lightning_fedfisher.update.decompression import decode_root, restore
from lightning_fedfisher.update.header import QuantizedTensor
from lightning_fedfisher.update.integer_coding import encode
from lightning_fedfisher.update.roots import flatten_root

ROWS = 24


def _packed_root(rank, dtype="float32", tail=0.0):
    """A root of small integers, packed; and the matrix that it is of, in float64."""
    generator = torch.Generator().manual_seed(rank)
    root = torch.randint(-50, 50, (rank, ROWS), generator=generator, dtype=torch.int32)
    root[:, 3] = 0  # an input that always is
    root = root.triu() if 2 * rank > ROWS else root
    packed = QuantizedTensor(0.125, dtype, rank, tail)
    whole = 0.125 * root.double()
    matrix = whole.mT @ whole
    matrix.diagonal().add_(tail * root.any(dim=0))
    return (encode(flatten_root(root)), packed, (ROWS, ROWS), "factor"), matrix


@pytest.mark.parametrize("tail", [0.0, 0.5])
@pytest.mark.parametrize("rank", [1, 7, 12, 13, ROWS])  # narrow, and triangles
@pytest.mark.parametrize("power", [1.0, 0.5, 0.25, 2.0])
def test_the_power_of_a_root_is_that_of_its_matrix(rank, power, tail):
    stored, matrix = _packed_root(rank, tail=tail)
    found = restore(*stored, power=power, dtype=torch.float64)
    assert found.dtype == torch.float64
    expected = reference_power(matrix, power)
    # The power of float64's rounding, where the matrix is singular.
    assert float((found - expected).norm() / expected.norm()) < max(1e-10, 1e-14**power)
    assert not found[3].any()
    torch.testing.assert_close(found, found.mT, rtol=1e-12, atol=1e-12)


def test_a_root_of_zeros_has_a_power_of_zeros():
    stored = encode(torch.zeros(2 * ROWS, dtype=torch.int32)), QuantizedTensor(1.0, "float32", 2)
    assert not restore(*stored, (ROWS, ROWS), "factor", 0.5).any()


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_values_are_squares_and_their_powers(power):
    numbers = torch.tensor([-3, 0, 2], dtype=torch.int32)
    stored = encode(numbers), QuantizedTensor(0.5, "float32"), (3,), "values"
    assert restore(*stored, power=power).tolist() == [1.5 ** (2 * power), 0.0, 1.0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_tensor_comes_back_in_its_type_or_in_the_one_asked_for(dtype):
    stored, matrix = _packed_root(7, dtype)
    assert restore(*stored).dtype == getattr(torch, dtype)
    found = restore(*stored, power=0.5, dtype=torch.float32)
    assert found.dtype == torch.float32
    expected = reference_power(matrix, 0.5)
    assert float((found - expected).norm() / expected.norm()) < 1e-5  # not that of half precision


@pytest.mark.parametrize(("damping", "of_inputs"), [(0.0, None), (0.1, None), (0.1, 0.8)])
def test_an_update_reads_powers_whether_packed_or_not(damping, of_inputs, tmp_path):
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(299, 60)
    (layer,) = find_layers(model)
    inputs = torch.randn(20, 300, generator=generator)
    outputs = torch.randn(15, 60, generator=generator)
    outputs[:, 7] = 0  # an output that no gradient reaches
    curvature = Kronecker(outputs.mT @ outputs / 15, inputs.mT @ inputs / 20)
    kinds = {layer.name: curvature.kind}
    header = UpdateHeader(7, "kfac", "exact", "categorical", 7, (layer,), kinds)
    plain = ClientUpdate.from_model(model, header, {layer.name: curvature})
    expected = curvature.power(0.5, damping, of_inputs)
    for update, exact in ((plain, 1e-6), (plain.compressed(2.0), 0.05)):
        assert (update is plain) == (exact == 1e-6)
        opened = ClientUpdate.open(update.save(tmp_path / "client.safetensors"))
        found = opened.block(layer, 0.5, damping=damping, inputs_power=of_inputs)
        assert not found.row_factor[7].any()
        for name, tensor in found.tensors().items():
            wanted = expected.tensors()[name]
            assert float((tensor - wanted).norm() / wanted.norm()) < exact
        for name, tensor in opened.block(layer).power(0.5, damping, of_inputs).tensors().items():
            wanted = found.tensors()[name]  # a whole matrix of rank 20 is one up to rounding only
            assert float((tensor - wanted).norm() / wanted.norm()) < 1e-2


@pytest.mark.parametrize("power", [0.0, -1.0, math.nan])
def test_powers_that_are_not_positive_are_refused(power):
    model = torch.nn.Linear(2, 1)
    (layer,) = find_layers(model)
    kinds = {layer.name: "diagonal"}
    header = UpdateHeader(7, "diagonal", "exact", "categorical", 7, (layer,), kinds)
    update = ClientUpdate.from_model(model, header, {layer.name: Diagonal(torch.ones(1, 3))})
    with pytest.raises(ValueError, match="greater than 0"):
        update.block(layer, power)


# Bytes of strangers


@pytest.mark.parametrize(
    ("step", "tail", "dtype"), [(1e-20, 1.0, "float32"), (1e-170, 0.0, "float64")]
)
def test_any_step_and_tail_have_a_power(step, tail, dtype):
    numbers = torch.arange(1, ROWS + 1, dtype=torch.int32)
    packed = QuantizedTensor(step, dtype, 1, tail)
    found = restore(encode(numbers), packed, (ROWS, ROWS), "factor", power=0.5)
    assert found.isfinite().all()
    exact = numbers.double()
    expected = step * torch.outer(exact, exact) / exact.norm() + tail * torch.eye(ROWS)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6 * (tail or step))


def _payload(form="factor", size=5):
    entries = size * (size + 1) // 2 if form == "factor" else size * size
    return encode(torch.arange(entries, dtype=torch.int32))


LIES = [
    (QuantizedTensor(1e30, "float32", 5), "factor", "values up to"),
    (QuantizedTensor(1e300, "float64"), "values", "values up to"),
    (QuantizedTensor(1e4, "float16"), "basis", "values up to"),
    (QuantizedTensor(1.0, "float32", 0), "factor", "packed bytes"),
    (QuantizedTensor(1.0, "float32", 2), "factor", "packed bytes"),
    (QuantizedTensor(1.0, "float32", 6), "factor", "5 rows has no rank of 6"),
    (QuantizedTensor(1.0, "float32", 10**9), "factor", "no rank of"),
]


@pytest.mark.parametrize(("packed", "form", "reason"), LIES)
def test_what_cannot_be_is_refused(packed, form, reason):
    for how in (decode_root, restore):
        with pytest.raises(ValueError, match=reason):
            how(_payload(form), packed, (5, 5), form)
