"""What cannot be a curvature is refused; sizes are bounded before anything is read."""

import dataclasses
import json
import math
import struct

import pytest
import torch
from helpers.small_updates import ASKED, header_of, linear, update_of
from torch import nn

from lightning_fedfisher import ClientUpdate, UpdateError
from lightning_fedfisher.curvature.convolution import ConvolutionKronecker
from lightning_fedfisher.curvature.dense import Dense
from lightning_fedfisher.curvature.diagonal import Diagonal
from lightning_fedfisher.curvature.embedding import EmbeddingEigenKronecker, EmbeddingKronecker
from lightning_fedfisher.curvature.input_gram import InputGram
from lightning_fedfisher.curvature.kronecker import Kronecker
from lightning_fedfisher.curvature.registry import KINDS
from lightning_fedfisher.update.file_format import UpdateFile
from lightning_fedfisher.update.header import QuantizedTensor
from lightning_fedfisher.update.integer_coding import encode
from lightning_fedfisher.update.tensor_checks import find_problem, is_semidefinite


def _moment(size, rows, dtype=torch.float32, seed=0):
    data = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))
    return (data.mT @ data / rows).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("size", [1, 5, 64])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e3])
def test_second_moments_are_sound_in_every_type(size, rows, dtype, scale):
    moment = _moment(size, rows, torch.float64) * scale
    if scale == 1e-6 and dtype == torch.float16:
        moment *= 100  # float16 holds nothing smaller
    assert find_problem(moment.to(dtype), "factor") == ""
    assert find_problem(moment.to(dtype), "factor", definite=False) == ""


@pytest.mark.parametrize("form", ["factor", "values", "basis", None])
def test_zeros_are_sound(form):
    assert find_problem(torch.zeros(3, 3), form) == ""
    assert find_problem(torch.zeros(0, 0), form) == ""
    assert find_problem(torch.tensor([[2**40, -(2**40)], [0, 1]]), form) == ""


@pytest.mark.parametrize(("below", "sound"), [(0.5e-4, True), (2e-4, False)])
def test_a_negative_eigenvalue_is_found_beyond_rounding(below, sound):
    basis, _ = torch.linalg.qr(
        torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).double()
    )
    values = torch.tensor([-below, 0.1, 0.2, 0.2, 0.2, 0.3 + below]).double()
    matrix = (basis * values) @ basis.mT
    matrix = (matrix + matrix.mT) / 2
    assert float(torch.linalg.eigvalsh(matrix)[0]) == pytest.approx(-below)
    assert is_semidefinite(matrix, 1e-4) == sound
    assert (find_problem(matrix, "factor") == "") == sound
    assert find_problem(matrix, "factor", definite=False) == ""


@pytest.mark.parametrize(("below", "sound"), [(0.5e-4, True), (2e-4, False)])
def test_negative_values_are_found_beyond_rounding(below, sound):
    assert (find_problem(torch.tensor([[1.0, -below]]), "values") == "") == sound


@pytest.mark.parametrize(("off", "sound"), [(0.5e-4, True), (2e-4, False)])
def test_asymmetry_is_found_beyond_rounding(off, sound):
    matrix = torch.eye(3)
    matrix[0, 2] = off
    assert find_problem(matrix, "factor") == ("" if sound else "is not symmetric")


def test_an_all_negative_factor_is_found():
    assert find_problem(-torch.eye(3), "factor") == "is not positive semi-definite"
    assert (
        find_problem(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), "factor")
        == "is not positive semi-definite"
    )


@pytest.mark.parametrize("form", ["factor", "values", "basis", None])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_found(form, value):
    matrix = torch.eye(3)
    matrix[1, 1] = value
    assert find_problem(matrix, form) == "holds 1 values that are not finite"


def test_what_float32_cannot_multiply_is_found_but_for_buffers():
    limits = {"factor": 1e18, "values": 1e18, "mean": 1e18, "weights": 1e9, "basis": 2.0}
    for form, most in limits.items():
        assert find_problem(torch.eye(2) * 1.1 * most, form).startswith("holds values up to")
        assert find_problem(torch.eye(2) * 0.9 * most, form) == ""
    assert find_problem(torch.full((2, 2), torch.finfo(torch.float32).min), None) == ""


FINE = {torch.float16: 9.8e-4, torch.bfloat16: 7.8e-3, torch.float32: 1e-4, torch.float64: 1e-4}


@pytest.mark.parametrize(("times", "sound"), [(0.5, True), (2.0, False)])
@pytest.mark.parametrize(("dtype", "rounding"), FINE.items(), ids=str)
def test_the_tolerance_is_that_of_the_type(dtype, rounding, times, sound):
    off = times * rounding
    lopsided, negative = torch.eye(3), torch.diag(torch.tensor([0.5, 0.5, -off]))
    lopsided[0, 2] = off
    assert (find_problem(lopsided.to(dtype), "factor") == "") == sound
    assert (find_problem(negative.to(dtype), "factor") == "") == sound
    assert (find_problem(torch.tensor([1.0, -off]).to(dtype), "values") == "") == sound
    for matrix in (lopsided, negative):
        assert find_problem(matrix.to(dtype), "factor", definite=False) == ""
        assert find_problem(matrix.to(dtype), None) == ""


@pytest.mark.parametrize("times", [1e-30, 0.4, 0.6, 1.9, 2.1])
def test_the_columns_of_a_basis_are_of_unit_length_but_for_coarse_rounding(times):
    basis, _ = torch.linalg.qr(
        torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).double()
    )
    basis[:, 2] *= times
    assert (find_problem(basis, "basis") == "") == (0.5 < times < 2)
    basis[:, 2] = 0
    assert find_problem(basis, "basis") == ""


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e12])
def test_soundness_does_not_depend_on_units(scale):
    indefinite = torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double()
    lopsided = torch.tensor([[1.0, 0.5], [0.4, 1.0]]).double()
    singular = torch.ones(4, 4).double()
    assert find_problem(scale * indefinite, "factor") == "is not positive semi-definite"
    assert find_problem(scale * lopsided, "factor") == "is not symmetric"
    assert find_problem(scale * singular, "factor") == ""
    assert find_problem(torch.block_diag(singular, torch.zeros(3, 3)) * scale, "factor") == ""
    assert "negative" in find_problem(scale * torch.tensor([1.0, -1.0]).double(), "values")


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int64], ids=str)
def test_whole_numbers_are_sound(dtype):
    limits = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    for form in ("values", None):
        assert find_problem(torch.tensor(limits, dtype=dtype), form) == ""


def test_buffers_are_what_float32_can_hold():
    most = torch.finfo(torch.float32).max
    assert find_problem(torch.tensor([most, -most], dtype=torch.float64), None) == ""
    assert find_problem(torch.tensor([2 * most], dtype=torch.float64), None).startswith(
        "holds values up to 6.8e+38"
    )
    for dtype in (torch.float16, torch.bfloat16):
        assert find_problem(torch.tensor([torch.finfo(dtype).min], dtype=dtype), None) == ""


# In files


@pytest.mark.parametrize(
    ("blocks", "curvature", "reason"),
    [
        (Kronecker(torch.eye(2), -torch.eye(4)), "kfac", "column_factor is not positive"),
        (Kronecker(torch.ones(2, 2).tril(), torch.eye(4)), "kfac", "row_factor is not symm"),
        (Diagonal(-torch.ones(2, 4)), "diagonal", "values holds negative values"),
    ],
)
def test_an_update_with_a_false_curvature_is_refused(blocks, curvature, reason, tmp_path):
    model = linear()
    header = header_of(model, blocks.kind)
    assert header.curvature == curvature
    name = header.layers[0].name
    with pytest.raises(UpdateError, match=reason):
        ClientUpdate.from_model(model, header, {name: blocks}).verify()
    tensors = {f"parameters/{n}": p.detach() for n, p in model.named_parameters()}
    tensors |= {f"curvature/{name}/{part}": tensor for part, tensor in blocks.tensors().items()}
    path = ClientUpdate(header, tensors).save(tmp_path / "false.safetensors")
    with pytest.raises(UpdateError, match=rf"curvature/{name}/{reason}") as error:
        ClientUpdate.open(path).verify()
    assert len(error.value.offenders) == 1


def test_a_small_file_does_not_become_a_large_tensor(tmp_path):
    """A root of one column: a few bytes for the square of its length."""
    layer = nn.Linear(2**20, 1, bias=False)
    header = header_of(layer, "kronecker")
    (name,) = header.kinds
    packed = {"parameters/weight": QuantizedTensor(1.0, "float32")}
    packed[f"curvature/{name}/column_factor"] = QuantizedTensor(1.0, "float32", 1, 0.0)
    zeros = encode(torch.zeros(2**20, dtype=torch.int32))
    tensors = {"parameters/weight": zeros, f"curvature/{name}/column_factor": zeros.clone()}
    tensors[f"curvature/{name}/row_factor"] = torch.eye(1)
    bomb = ClientUpdate(dataclasses.replace(header, quantized=packed), tensors)
    path = bomb.save(tmp_path / "bomb.safetensors")
    assert path.stat().st_size < 2**20
    with pytest.raises(UpdateError) as error:
        ClientUpdate.open(path)
    by_itself, in_all = error.value.offenders
    assert by_itself == (
        f"curvature/{name}/column_factor takes {2**42} bytes, more than max_tensor_bytes={2**32}"
    )
    assert in_all.startswith(f"it unpacks to {2**42 + 2**22} bytes, and a file")
    with pytest.raises(UpdateError, match="it unpacks to"):
        ClientUpdate.open(path, max_tensor_bytes=2**42)


def test_a_limit_of_ones_own_is_kept(tmp_path):
    path = update_of(linear()).save(tmp_path / "small.safetensors")
    assert ClientUpdate.open(path, max_tensor_bytes=24).num_samples == 7
    with pytest.raises(UpdateError, match="parameters/weight takes 24 bytes, more than"):
        ClientUpdate.open(path, max_tensor_bytes=23)


def test_a_long_header_is_not_read(tmp_path):
    path = tmp_path / "long.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**24 + 1))
        file.truncate(2**30)  # sparse
    with pytest.raises(UpdateError, match="truncated or damaged: a header of 16777217 bytes"):
        ClientUpdate.open(path)


def _moments(*sizes):
    return [_moment(size, 2 * size, seed=size) for size in sizes]


def _of_kind(kind):
    values = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    match kind:
        case "diagonal":
            return Diagonal(values)
        case "dense":
            return Dense(_moment(8, 16), (2, 4))
        case "input_gram":
            return InputGram(_moment(4, 8), rows=2)
        case "kronecker" | "transposed_kronecker":
            return KINDS[kind](*_moments(2, 4))
        case "convolution_kronecker":
            return ConvolutionKronecker(_moment(2, 4), *_moments(2, 2))
        case "embedding_kronecker":
            return EmbeddingKronecker(values[:, 0].contiguous(), _moment(4, 8))
        case "ekfac" | "transposed_ekfac":
            return KINDS[kind](torch.eye(2), torch.eye(4), values)
    return EmbeddingEigenKronecker(torch.eye(4), values)


FORMS = {
    ("diagonal", "values"): "values",
    ("dense", "matrix"): "factor",
    ("input_gram", "column_factor"): "factor",
    ("kronecker", "row_factor"): "factor",
    ("kronecker", "column_factor"): "factor",
    ("transposed_kronecker", "row_factor"): "factor",
    ("transposed_kronecker", "column_factor"): "factor",
    ("convolution_kronecker", "row_factor"): "factor",
    ("convolution_kronecker", "channel_factor"): "factor",
    ("convolution_kronecker", "kernel_factor"): "factor",
    ("embedding_kronecker", "row_values"): "values",
    ("embedding_kronecker", "column_factor"): "factor",
    ("ekfac", "row_basis"): "basis",
    ("ekfac", "column_basis"): "basis",
    ("ekfac", "spectrum"): "values",
    ("transposed_ekfac", "row_basis"): "basis",
    ("transposed_ekfac", "column_basis"): "basis",
    ("transposed_ekfac", "spectrum"): "values",
    ("embedding_ekfac", "column_basis"): "basis",
    ("embedding_ekfac", "spectrum"): "values",
}


FLAWS = {
    "asymmetric": (lambda t: t + t.triu(1), "is not symmetric", ("factor",)),
    "indefinite": (
        lambda t: t - 0.5 * t.trace() * torch.eye(len(t)),
        "is not positive semi-definite",
        ("factor",),
    ),
    "negative": (lambda t: t.clone().flatten()[0].neg() - t, "holds negative values", ("values",)),
    "not a number": (lambda t: t * torch.nan, "not finite", ("factor", "values", "basis")),
    "infinite": (lambda t: t / 0, "not finite", ("factor", "values", "basis")),
    "too large": (lambda t: t * 1e20, "more than 1e+18", ("factor", "values")),
    "too large for a basis": (lambda t: t * 4, "more than 2", ("basis",)),
}


def _file_of(kind, tmp_path, change=None, dtype=torch.float32):
    """A file of one layer, with one tensor of its curvature changed; every digest holds."""
    model = nn.Conv1d(2, 2, 2, bias=False) if kind == "convolution_kronecker" else linear()
    model, block = model.to(dtype), _of_kind(kind)
    header = header_of(model, kind, curvature=ASKED[kind])
    (name,) = header.kinds
    tensors = {f"parameters/{n}": p.detach() for n, p in model.named_parameters()}
    for part, tensor in block.tensors().items():
        tensors[f"curvature/{name}/{part}"] = tensor.to(dtype)
    if change:
        part, spoil = change
        key = f"curvature/{name}/{part}"
        tensors[key] = spoil(tensors[key])
    return ClientUpdate(header, tensors).save(tmp_path / "update.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ASKED)
def test_every_kind_is_accepted_as_it_is_in_every_type(kind, dtype, tmp_path):
    update = ClientUpdate.open(_file_of(kind, tmp_path, dtype=dtype))
    update.verify()
    assert update.block(update.layers[0]).kind == kind


@pytest.mark.parametrize("flawed", FLAWS)
@pytest.mark.parametrize(("kind", "part"), FORMS)
def test_a_flaw_in_any_part_of_a_curvature_is_refused_by_name(kind, part, flawed, tmp_path):
    spoil, reason, forms = FLAWS[flawed]
    if FORMS[kind, part] not in forms:
        spoil, reason = (lambda t: t.clone()), ""
    update = ClientUpdate.open(_file_of(kind, tmp_path, (part, spoil)))
    if not reason:
        update.verify()
        return
    with pytest.raises(UpdateError) as error:
        update.verify()
    (offender,) = error.value.offenders
    assert offender.startswith(f"curvature/{update.layers[0].name}/{part} holds") or (
        offender == f"curvature/{update.layers[0].name}/{part} {reason}"
    )
    assert reason in offender
    assert str(tmp_path) in str(error.value)


def test_the_form_of_every_part_is_checked():
    assert {(kind, part) for kind in ASKED for part in KINDS[kind].tensor_roles} == set(FORMS)


@pytest.mark.parametrize(("kind", "part"), FORMS)
def test_no_curvature_at_all_is_sound(kind, part, tmp_path):
    ClientUpdate.open(_file_of(kind, tmp_path, (part, torch.zeros_like))).verify()


def _packed_file(tmp_path, how, numbers, outputs=1):
    """A file whose output factor is packed, of a layer of so many outputs."""
    model = nn.Linear(2, outputs, bias=False)
    key = "curvature/weight/row_factor"
    header = header_of(model, "kronecker", quantized={key: how})
    tensors = {"parameters/weight": torch.ones(outputs, 2), key: encode(numbers)}
    tensors["curvature/weight/column_factor"] = torch.eye(2)
    return ClientUpdate(header, tensors).save(tmp_path / "packed.safetensors")


@pytest.mark.parametrize(
    ("dtype", "step", "rank", "sound"),
    [
        ("float32", 0.9e9, 1, True),
        ("float32", 1.1e9, 1, False),
        ("float32", 0.9e8, 100, True),
        ("float32", 1.1e8, 100, False),
        ("float64", 1.1e8, 100, False),
        ("bfloat16", 1.1e8, 100, False),
        ("float16", 25.0, 100, True),
        ("float16", 26.0, 100, False),
    ],
)
def test_packed_curvature_is_bounded_however_many_rows_its_root_has(
    dtype, step, rank, sound, tmp_path
):
    ones = torch.ones(rank * (rank + 1) // 2, dtype=torch.int32)
    path = _packed_file(tmp_path, QuantizedTensor(step, dtype, rank, 0.0), ones, outputs=rank)
    update = ClientUpdate.open(path)
    if sound:
        update.verify()
        factor = update.block(update.layers[0]).row_factor
        assert factor.dtype == getattr(torch, dtype)
        assert float(factor.max()) == pytest.approx(rank * step**2, rel=1e-2)
        return
    for read in (update.verify, lambda: update.block(update.layers[0])):
        with pytest.raises(UpdateError, match="weight/row_factor cannot be unpacked") as error:
            read()
        assert "it holds values up to" in str(error.value)


def test_a_tail_counts_as_well(tmp_path):
    ones = torch.ones(3, dtype=torch.int32)
    for tail, sound in ((0.9e18, True), (1.1e18, False)):
        path = _packed_file(tmp_path, QuantizedTensor(1.0, "float32", 1, tail), ones, outputs=3)
        if sound:
            ClientUpdate.open(path).verify()
        else:
            with pytest.raises(UpdateError, match=r"values up to 1\.1e\+18, more than 1\.0e\+18"):
                ClientUpdate.open(path).verify()


def test_nothing_is_allocated_for_what_is_refused(tmp_path, monkeypatch):
    update = update_of(linear())
    path = update.save(tmp_path / "small.safetensors")

    def read(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(UpdateFile, "__getitem__", read)
    with pytest.raises(UpdateError) as error:
        ClientUpdate.open(path, max_tensor_bytes=7)
    assert [offender.split()[0] for offender in error.value.offenders] == [
        "parameters/bias",
        "parameters/weight",
    ]


@pytest.mark.parametrize(
    ("count", "reason"), [(2**14, ""), (2**14 + 1, "holds 16385 tensors, more than 16384")]
)
def test_more_tensors_than_any_model_has_are_refused(count, reason, tmp_path):
    """By the safetensors header alone: no tensor has a byte."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    head = {str(index): entry for index in range(count)}
    head["__metadata__"] = {"lightning_fedfisher": json.dumps({})}
    text = json.dumps(head).encode()
    path = tmp_path / "many.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(UpdateError, match=reason or "header is missing or malformed"):
        ClientUpdate.open(path)


@pytest.mark.parametrize("size", [2**24, 2**24 + 1, 2**63])
def test_the_length_of_the_header_is_judged_before_it_is_read(size, tmp_path):
    path = tmp_path / "long.safetensors"
    path.write_bytes(struct.pack("<Q", size) + b"{}")
    with pytest.raises(UpdateError, match="truncated or damaged") as error:
        ClientUpdate.open(path)
    assert (f"a header of {size} bytes" in str(error.value)) == (size > 2**24)


@pytest.mark.parametrize("step", [1e39, 1e300])
def test_a_step_of_which_zero_times_is_no_number_is_refused(step, tmp_path):
    how = QuantizedTensor(step, "float32", 1, 0.0)
    update = ClientUpdate.open(_packed_file(tmp_path, how, torch.zeros(1, dtype=torch.int32)))
    with pytest.raises(UpdateError, match="its step is"):
        update.verify()
    with pytest.raises(UpdateError, match="its step is"):
        update.block(update.layers[0])
