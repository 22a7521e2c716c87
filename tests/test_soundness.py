"""What cannot be a curvature is refused; sizes are bounded before anything is read."""

import dataclasses
import json
import math
import struct

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_fedfisher import (
    ClientUpdate,
    Diagonal,
    Identity,
    Kronecker,
    UpdateError,
    UpdateHeader,
    find_layers,
)
from lightning_fedfisher.packing import pack
from lightning_fedfisher.soundness import flaw, is_semidefinite
from lightning_fedfisher.update_header import Packed


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
    assert flaw(moment.to(dtype), "factor") == ""
    assert flaw(moment.to(dtype), "basis") == ""


@pytest.mark.parametrize("form", ["factor", "values", "basis", None])
def test_zeros_are_sound(form):
    assert flaw(torch.zeros(3, 3), form) == ""
    assert flaw(torch.zeros(0, 0), form) == ""
    assert flaw(torch.tensor([[2**40, -(2**40)], [0, 1]]), form) == ""


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
    assert (flaw(matrix, "factor") == "") == sound
    assert flaw(matrix, "basis") == ""


@pytest.mark.parametrize(("below", "sound"), [(0.5e-4, True), (2e-4, False)])
def test_negative_values_are_found_beyond_rounding(below, sound):
    assert (flaw(torch.tensor([[1.0, -below]]), "values") == "") == sound


@pytest.mark.parametrize(("off", "sound"), [(0.5e-4, True), (2e-4, False)])
def test_asymmetry_is_found_beyond_rounding(off, sound):
    matrix = torch.eye(3)
    matrix[0, 2] = off
    assert flaw(matrix, "factor") == ("" if sound else "is not symmetric")


def test_an_all_negative_factor_is_found():
    assert flaw(-torch.eye(3), "factor") == "is not positive semi-definite"
    assert flaw(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), "factor") == "is not positive semi-definite"


@pytest.mark.parametrize("form", ["factor", "values", "basis", None])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_found(form, value):
    matrix = torch.eye(3)
    matrix[1, 1] = value
    assert flaw(matrix, form) == "holds 1 values that are not finite"


def test_what_float32_cannot_multiply_is_found_but_for_buffers():
    for form in ("factor", "values", "basis"):
        assert flaw(torch.eye(2) * 1.1e18, form).startswith("holds values up to 1.1e+18")
        assert flaw(torch.eye(2) * 0.9e18, form) == ""
    assert flaw(torch.full((2, 2), torch.finfo(torch.float32).min), None) == ""


# In files


def _header(model, kind="identity", **changes):
    layers = find_layers(model)
    kinds = {layer.name: kind for layer in layers}
    curvature = "kfac" if kind == "kronecker" else kind
    plain = UpdateHeader(7, curvature, "", "categorical", 0, layers, kinds)
    return dataclasses.replace(plain, **changes)


def _update(model, **changes):
    blocks = {layer.name: Identity(layer.shape) for layer in find_layers(model)}
    return ClientUpdate.from_model(model, _header(model, **changes), blocks)


def _linear(**changes):
    torch.manual_seed(0)
    return nn.Linear(3, 2, **changes)


@pytest.mark.parametrize(
    ("blocks", "curvature", "reason"),
    [
        (Kronecker(torch.eye(2), -torch.eye(4)), "kfac", "input_factor is not positive"),
        (Kronecker(torch.ones(2, 2).tril(), torch.eye(4)), "kfac", "output_factor is not symm"),
        (Diagonal(-torch.ones(2, 4)), "diagonal", "values holds negative values"),
    ],
)
def test_an_update_with_a_false_curvature_is_refused(blocks, curvature, reason, tmp_path):
    model = _linear()
    header = _header(model, blocks.kind)
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


def test_a_kind_that_its_extraction_cannot_give_is_refused():
    header = _header(_linear(), "kronecker", curvature="diagonal")
    tensors = {"parameters/weight": torch.ones(2, 3), "parameters/bias": torch.ones(2)}
    tensors |= {"curvature/weight/output_factor": torch.eye(2)}
    tensors |= {"curvature/weight/input_factor": torch.eye(4)}
    with pytest.raises(UpdateError, match="kronecker is not diagonal curvature"):
        ClientUpdate(header, tensors)
    ClientUpdate(dataclasses.replace(header, curvature="kfac"), tensors)


def test_a_small_file_does_not_become_a_large_tensor(tmp_path):
    """A root of one column: a few bytes for the square of its length."""
    layer = nn.Linear(2**20, 1, bias=False)
    header = _header(layer, "kronecker")
    (name,) = header.kinds
    packed = {"parameters/weight": Packed(1.0, "float32")}
    packed[f"curvature/{name}/input_factor"] = Packed(1.0, "float32", 1, 0.0)
    zeros = pack(torch.zeros(2**20, dtype=torch.int32))
    tensors = {"parameters/weight": zeros, f"curvature/{name}/input_factor": zeros.clone()}
    tensors[f"curvature/{name}/output_factor"] = torch.eye(1)
    bomb = ClientUpdate(dataclasses.replace(header, packed=packed), tensors)
    path = bomb.save(tmp_path / "bomb.safetensors")
    assert path.stat().st_size < 2**20
    with pytest.raises(UpdateError) as error:
        ClientUpdate.open(path)
    (offender,) = error.value.offenders
    assert offender == (
        f"curvature/{name}/input_factor takes {2**42} bytes, more than max_tensor_bytes={2**32}"
    )
    assert ClientUpdate.open(path, max_tensor_bytes=2**42).num_samples == 7


def test_a_limit_of_ones_own_is_kept(tmp_path):
    path = _update(_linear()).save(tmp_path / "small.safetensors")
    assert ClientUpdate.open(path, max_tensor_bytes=24).num_samples == 7
    with pytest.raises(UpdateError, match="parameters/weight takes 24 bytes, more than"):
        ClientUpdate.open(path, max_tensor_bytes=23)


@pytest.mark.parametrize("name", ["num_samples", "curvature_samples"])
def test_counts_nobody_has_are_refused(name):
    _update(_linear(), **{name: 2**40})
    with pytest.raises(UpdateError, match=f"{name} is more than"):
        _update(_linear(), **{name: 2**40 + 1})


def test_a_long_header_is_not_read(tmp_path):
    path = tmp_path / "long.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**24 + 1))
        file.truncate(2**30)  # sparse
    with pytest.raises(UpdateError, match="truncated or damaged: a header of 16777217 bytes"):
        ClientUpdate.open(path)


def test_more_tensors_than_any_model_has_are_refused(tmp_path):
    path = tmp_path / "many.safetensors"
    many = {str(index): torch.zeros(1) for index in range(2**14 + 1)}
    save_file(many, path, {"lightning_fedfisher": json.dumps({})})
    with pytest.raises(UpdateError, match="holds 16385 tensors, more than 16384"):
        ClientUpdate.open(path)


@pytest.mark.parametrize(
    ("statistic", "value", "reason"),
    [
        ("running_var", -1.0, r"buffers/2\.running_var holds negative values"),
        ("running_var", 1e19, r"buffers/2\.running_var holds values up to"),
        ("running_mean", -1e19, r"buffers/2\.running_mean holds values up to"),
    ],
)
def test_running_statistics_that_cannot_be_merged_are_refused(statistic, value, reason):
    model = nn.Sequential(_linear(), nn.Linear(3, 2), nn.BatchNorm1d(2, affine=False))
    _update(model)
    getattr(model[2], statistic).fill_(value)
    with pytest.raises(UpdateError, match=reason):
        _update(model)


# The model's fingerprint


def _tied():
    model = nn.Sequential(_linear(), nn.Linear(3, 2))
    model[1].weight = model[0].weight
    return model


def _untied():
    return nn.Sequential(_linear(), nn.Linear(3, 2))


def _frozen(value):
    model = _untied()
    model[1].requires_grad_(False)
    nn.init.constant_(model[1].weight, value)
    return model


MODELS = {
    "plain": _untied(),
    "shared": _tied(),
    "double": _untied().double(),
    "wider": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)),
    "named": nn.ModuleDict({"a": _linear(), "b": nn.Linear(3, 2)}),
    "frozen": _frozen(1.0),
    "frozen otherwise": _frozen(2.0),
    "with buffers": nn.Sequential(_linear(), nn.Linear(3, 2), nn.BatchNorm1d(2, affine=False)),
}


def test_models_are_told_apart_by_their_fingerprint():
    found = {name: _update(model).model_fingerprint for name, model in MODELS.items()}
    assert len(set(found.values())) == len(MODELS)
    other = _update(_untied(), num_samples=8)
    assert other.model_fingerprint == found["plain"]
    assert other.digest != _update(_untied()).digest


def test_digest_and_size_are_those_of_the_file(tmp_path):
    update = _update(MODELS["with buffers"])
    path = update.save(tmp_path / "update.safetensors")
    opened = ClientUpdate.open(path)
    assert opened.digest == update.digest
    assert opened.upload_bytes == update.upload_bytes == path.stat().st_size
    assert opened.sent_bytes("buffers/") == 2 * 2 * 4 + 8
    assert opened.sent_bytes("parameters/0.weight") == 24
