"""Roots of one row stand for matrices; a file may not stand for any size."""

import dataclasses

import pytest
import torch
from helpers.small_updates import header_of
from torch import nn

from lightning_fedfisher import BudgetError, ClientUpdate, UpdateError
from lightning_fedfisher.curvature.kronecker import Kronecker
from lightning_fedfisher.update.header import QuantizedTensor
from lightning_fedfisher.update.integer_coding import encode
from lightning_fedfisher.update.unpacked_size import excesses, unpacked_excess


def _bomb(columns, layers, dtype, rank):
    """Layers of one row each, whose column factor is packed as a root of so many rows."""
    model = nn.Sequential(*(nn.Linear(columns, 1, bias=False) for _ in range(layers)))
    header, tensors, packed = header_of(model, "kronecker"), {}, {}
    for layer in header.layers:
        (weight,) = layer.parameter_names
        for name, count, rows in (
            (f"parameters/{weight}", columns, 0),
            (f"curvature/{layer.name}/column_factor", rank * columns, rank),
            (f"curvature/{layer.name}/row_factor", 1, 1),
        ):
            packed[name] = QuantizedTensor(1.0, dtype, rows)
            tensors[name] = encode(torch.ones(count, dtype=torch.int32))
    return ClientUpdate(dataclasses.replace(header, quantized=packed), tensors)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize(("columns", "layers", "rank"), [(4096, 1, 1), (4096, 9, 0), (2048, 64, 1)])
def test_a_file_of_kilobytes_is_no_matrix_of_megabytes(columns, layers, rank, dtype, tmp_path):
    path = _bomb(columns, layers, dtype, rank).save(tmp_path / "bomb.safetensors")
    with pytest.raises(UpdateError, match="it unpacks to") as error:
        ClientUpdate.open(path)
    assert str(path) in str(error.value)
    assert len(error.value.offenders) == 1


def test_narrow_layers_at_a_budget_of_one_are_read(tmp_path):
    """The widest that fits: as many columns as memory is allowed for each byte of the file."""
    layer = nn.Linear(2048, 1, bias=False)
    factor = torch.randn(16, 2048)
    block = Kronecker(torch.eye(1), factor.mT @ factor / 16)
    update = ClientUpdate.from_model(layer, header_of(layer, "kronecker"), {"weight": block})
    update.require_room(1.0)
    small = update.compressed(1.0)
    assert small.header.quantized
    path = small.save(tmp_path / "small.safetensors")
    assert path.stat().st_size < 2**14 + 1
    opened = ClientUpdate.open(path)
    opened.verify()
    assert opened.block(opened.layers[0]).shape == (1, 2048)


def test_a_client_is_told_before_a_server_refuses_its_file(monkeypatch):
    monkeypatch.setattr("lightning_fedfisher.update.unpacked_size._UNPACKED_ANYWAY", 2**12)
    monkeypatch.setattr("lightning_fedfisher.update.unpacked_size._UNPACKED_TIMES", 8)
    layer = nn.Linear(2048, 1, bias=False)
    block = Kronecker(torch.eye(1), torch.eye(2048))
    update = ClientUpdate.from_model(layer, header_of(layer, "kronecker"), {"weight": block})
    for refused in (update.require_room, update.compressed):
        with pytest.raises(BudgetError, match=r"it unpacks to .* Raise it, send a smaller kind"):
            refused(1.0)


def test_excesses_are_by_tensor_and_in_all():
    update = _bomb(64, 2, "float32", 1)
    header, specs = update.header, update._specs
    assert excesses(header, specs, update.upload_bytes, 2**32) == []
    assert unpacked_excess(header, header.quantized, 0) == ""
    found = excesses(header, specs, update.upload_bytes, 4 * 64 * 64 - 1)
    assert [line.split()[0] for line in found] == [
        "curvature/0/column_factor",
        "curvature/1/column_factor",
    ]
