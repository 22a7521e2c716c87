"""What of a model is sent: values, whatever memory they lie in, and nothing twice."""

import torch
from helpers.small_updates import header_of, linear
from helpers.update_files import content, make_header, make_update, read
from torch import nn

from lightning_fedfisher import ClientUpdate
from lightning_fedfisher.curvature.base import Identity
from lightning_fedfisher.curvature.diagonal import Diagonal
from lightning_fedfisher.layers import find_layers
from lightning_fedfisher.update.file_format import digest
from lightning_fedfisher.update.model_tensors import collect_tensors


def test_batch_norm_counters_travel_and_non_persistent_buffers_stay():
    model, _, update = make_update("diagonal")
    assert set(update.buffers) == {
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    assert update.buffers["norm.num_batches_tracked"].dtype == torch.int64
    assert update.buffers["norm.num_batches_tracked"] == 1
    assert "constant" in dict(model.named_buffers())


def test_update_does_not_alias_the_model():
    model, _, update = make_update("diagonal")
    before = content(update)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.add_(1)
    assert content(update) == before


def test_curvature_which_never_changes_is_not_copied():
    _, blocks, update = make_update("diagonal")
    for name, block in blocks.items():
        (layer,) = [layer for layer in update.layers if layer.name == name]
        assert update.block(layer).values.data_ptr() == block.values.data_ptr()


def test_strided_and_shared_memory_is_sent_as_values(tmp_path):
    linear = nn.Linear(4, 3, bias=False)
    linear.weight = nn.Parameter(torch.arange(12.0).reshape(4, 3).T)
    linear.register_buffer("expanded", torch.ones(1, 3).expand(2, 3))
    linear.register_buffer("view", linear.weight.detach()[:2])
    shared = torch.arange(12.0).reshape(3, 4)
    layers = find_layers(linear)
    blocks = {layers[0].name: Diagonal(shared)}
    linear.register_buffer("shared", shared)
    update = ClientUpdate.from_model(linear, make_header("diagonal", layers, blocks), blocks)
    opened = read(update.save(tmp_path / "client.safetensors"))
    assert torch.equal(opened.parameters["weight"], linear.weight)
    assert torch.equal(opened.buffers["expanded"], torch.ones(2, 3))
    assert torch.equal(opened.buffers["view"], linear.weight[:2])
    assert torch.equal(opened.block(layers[0]).values, shared)


def test_shared_and_frozen_parameters_are_named_and_not_sent():
    model = nn.Sequential(linear(), nn.Linear(3, 2), nn.Linear(3, 2))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    blocks = {layer.name: Identity(layer.shape) for layer in find_layers(model)}
    header, tensors = collect_tensors(model, header_of(model), blocks)
    assert tensors.keys() == {f"parameters/{n}" for n in ("0.weight", "0.bias", "1.bias")}
    assert header.aliases == {"1.weight": "0.weight"}
    assert header.frozen == {f"2.{n}": digest(p) for n, p in model[2].named_parameters()}


def test_what_is_sent_of_a_view_is_whole():
    model = nn.Linear(4, 3, bias=False)
    model.weight = nn.Parameter(torch.arange(12.0).reshape(4, 3).T)
    blocks = {"weight": Diagonal(torch.rand(4, 3).T)}
    _, tensors = collect_tensors(model, header_of(model, "diagonal"), blocks)
    assert tensors.keys() == {"parameters/weight", "curvature/weight/values"}
    for tensor, original in zip(
        tensors.values(), (model.weight, blocks["weight"].values), strict=True
    ):
        assert torch.equal(tensor, original)
        assert tensor.is_contiguous()
        assert tensor.data_ptr() != original.data_ptr()
        assert not tensor.requires_grad
