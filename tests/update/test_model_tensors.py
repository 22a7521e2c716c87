"""What of a model is sent: values, whatever memory they lie in, and nothing twice."""

import pytest
import torch
from helpers.small_updates import header_of, linear
from helpers.update_files import content, make_header, make_update, read
from torch import nn

from lightning_fedfisher import ClientUpdate, UpdateError
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


@pytest.mark.parametrize(
    ("buffer", "kind"),
    [
        (torch.eye(2).to_sparse(), "sparse_coo"),
        (torch.ones(2, dtype=torch.complex64), "complex64"),
        (torch.ones(2, dtype=torch.uint16), "uint16"),
        (torch.ones(2).to(torch.float8_e4m3fn), "float8_e4m3fn"),
    ],
)
def test_buffers_that_no_update_holds_are_named(buffer, kind):
    model = nn.ModuleDict({"net": nn.Linear(2, 2)})
    model["net"].register_buffer("odd", buffer)
    model["net"].register_buffer("constant", buffer, persistent=False)
    with pytest.raises(UpdateError, match=rf"net\.odd is {kind}.*persistent=False") as caught:
        collect_tensors(model, header_of(model), {})
    assert len(caught.value.offenders) == 1


def test_what_state_dict_names_otherwise_is_refused_by_name():
    class Renaming(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.register_buffer("scale", torch.ones(2))

        def state_dict(self, *args, **kwargs):
            state = super().state_dict(*args, **kwargs)
            return {f"other.{name}": tensor for name, tensor in state.items()}

    model = Renaming()
    with pytest.raises(UpdateError) as caught:
        collect_tensors(model, header_of(model), {})
    told = "\n".join(caught.value.offenders)
    assert all(f"{n} has another name" in told for n in ("inner.weight", "inner.bias", "scale"))


def test_a_compiled_part_is_sent_under_its_own_names():
    plain = nn.ModuleDict({"net": nn.Linear(2, 2)})
    model = nn.ModuleDict({"net": torch.compile(plain["net"], backend="eager")})
    _, sent = collect_tensors(model, header_of(plain), {})
    assert sent.keys() == {"parameters/net.weight", "parameters/net.bias"}


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
