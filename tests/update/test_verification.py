"""What tensors are, each alone and together: nothing that a merge could not multiply."""

import dataclasses

import pytest
import torch
from helpers.small_updates import ASKED, header_of, linear
from torch import nn

from lightning_fedfisher import ClientUpdate, UpdateError
from lightning_fedfisher.curvature.kronecker import Kronecker
from lightning_fedfisher.curvature.registry import KINDS
from lightning_fedfisher.update.header import QuantizedTensor
from lightning_fedfisher.update.integer_coding import encode
from lightning_fedfisher.update.verification import LARGEST_PRODUCT, damages


def _update(kind, weight, curvature):
    """An update of one layer, with all weights and all curvature of such a size."""
    model = linear()
    nn.init.constant_(model.weight, weight)
    header = header_of(model, kind, curvature=ASKED[kind])
    (layer,) = header.layers
    shapes = KINDS[kind].tensor_shapes(layer.shape, layer.kernel)
    tensors = {f"parameters/{n}": p.detach() for n, p in model.named_parameters()}
    for part, role in KINDS[kind].tensor_roles.items():
        shape = shapes[part]
        tensors[f"curvature/{layer.name}/{part}"] = {
            "factor": lambda shape: curvature * torch.eye(*shape),
            "values": lambda shape: torch.full(shape, curvature),
            "basis": lambda shape: torch.eye(*shape),
        }[role](shape)
    return header, tensors


@pytest.mark.parametrize("kind", [kind for kind in ASKED if "embedding" not in kind])
def test_weights_and_curvature_may_be_too_large_together(kind):
    if kind == "convolution_kronecker":
        pytest.skip("of a convolution alone")
    factors = sum(role == "factor" for role in KINDS[kind].tensor_roles.values()) or 1
    large = 1e25 ** (1 / factors) if factors == 2 else 1e18
    weight = 1e8 if factors == 2 else 1e9
    header, tensors = _update(kind, 1.0, 1e6)
    assert damages(header, tensors) == []
    header, tensors = _update(kind, weight, min(large, 1e18))
    together = weight * large**factors * 8 > LARGEST_PRODUCT
    found = damages(header, tensors)
    assert bool(found) == together
    assert all(line.startswith(f"layer {header.layers[0].name}: weights up to") for line in found)


def test_two_factors_that_float32_cannot_multiply_are_refused_packed_or_not(tmp_path):
    header, tensors = _update("kronecker", 1.0, 0.9e18)
    (layer,) = header.layers
    packed = {f"curvature/{layer.name}/{part}": 4 for part in ("row_factor", "column_factor")}
    sizes = {name: len(tensors[name]) for name in packed}
    quantized = {n: QuantizedTensor(1e8, "float32", rank) for n, rank in sizes.items()}
    roots = {n: encode(torch.eye(s)[torch.ones(s, s).triu() > 0] * 3) for n, s in sizes.items()}
    for update in (
        ClientUpdate(header, tensors),
        ClientUpdate(dataclasses.replace(header, quantized=quantized), tensors | roots),
    ):
        opened = ClientUpdate.open(update.save(tmp_path / "large.safetensors"))
        with pytest.raises(UpdateError, match="too large for float32 together") as error:
            opened.verify()
        assert len(error.value.offenders) == 1
        opened.verify(curvature=False)


def test_a_client_hears_of_it_itself():
    model = linear()
    block = Kronecker(1e17 * torch.eye(2), 1e17 * torch.eye(4))
    with pytest.raises(UpdateError, match="too large for float32 together"):
        ClientUpdate.from_model(model, header_of(model, "kronecker"), {"weight": block})
    nn.init.constant_(model.weight, 2e9)
    with pytest.raises(UpdateError, match=r"weight holds values up to 2\.0e\+09, more than 1e\+09"):
        ClientUpdate.from_model(model, header_of(model), {})


def test_whatever_a_check_runs_into_is_told_by_tensor(monkeypatch):
    def failing(*_):
        raise RuntimeError("not enough memory: you tried to allocate 1 byte")

    header, tensors = _update("diagonal", 1.0, 1.0)
    monkeypatch.setattr("lightning_fedfisher.update.verification.find_problem", failing)
    found = damages(header, tensors)
    assert [line.split()[0] for line in found] == list(tensors)
    assert all("not enough memory" in line for line in found)
