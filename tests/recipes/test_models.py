from collections import Counter
from typing import get_args

import pytest
import torch
from simulation.data import load_images
from simulation.flags import Flags, ModelName, settle
from simulation.models import CNN, MODELS, NORMALISED, PLAIN, LeNet, ResNet, build_model
from torch import nn

from lightning_fedfisher import ClientUpdate, extract_curvature, merge_updates


def _weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_published_weight_counts():
    assert _weights(LeNet()) == 44_190
    assert _weights(CNN()) == 939_616
    assert _weights(ResNet(classes=10)) == 11_164_352


@pytest.mark.parametrize(("channels", "image_size"), [(1, 28), (3, 32)])
@pytest.mark.parametrize("name", MODELS)
def test_logits(name, channels, image_size):
    model = build_model(name, channels, image_size, classes=7)
    images = torch.randn(2, channels, image_size, image_size)
    logits = model(images)
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", PLAIN)
def test_only_convolutions_and_linears_without_bias_called_once(name):
    model = build_model(name, 3, 32, 10)
    holders = {n: m for n, m in model.named_modules() if list(m.parameters(recurse=False))}
    assert all(isinstance(m, nn.Conv2d | nn.Linear) and m.bias is None for m in holders.values())
    calls = Counter()
    for holder, module in holders.items():
        module.register_forward_hook(lambda *_, holder=holder: calls.update([holder]))
    model(torch.randn(1, 3, 32, 32))
    assert calls == dict.fromkeys(holders, 1)


def test_resnet18_has_the_published_layers():
    kernels = [m.kernel_size[0] for m in ResNet().modules() if isinstance(m, nn.Conv2d)]
    assert kernels.count(3) == 17
    assert kernels.count(1) == 3


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("resnet8_batchnorm", nn.BatchNorm2d, 7),
        ("resnet8_groupnorm", nn.GroupNorm, 7),
        ("torchvision_resnet18", nn.BatchNorm2d, 20),
        ("vit", nn.LayerNorm, 9),
    ],
)
def test_normalisation_follows_each_convolution_or_precedes_each_branch(name, kind, count):
    model = build_model(name, 3, 32, 10)
    assert sum(isinstance(module, kind) for module in model.modules()) == count


@pytest.mark.parametrize("name", NORMALISED)
def test_networks_with_normalisation_are_merged_layer_by_layer(name):
    updates = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = build_model(name, 3, 32, 6)
        for parameter in model.parameters():  # a transformer's head starts at zero
            nn.init.normal_(parameter, parameter.mean().item(), 0.05)
        batch = torch.randn(6, 3, 32, 32), torch.arange(6)
        found = extract_curvature(model, [batch], progress=False)
        updates.append(ClientUpdate.from_model(model, found.header(6), found.blocks))
    result = merge_updates(updates)
    assert result.solved
    model.load_state_dict(result.state_dict)
    # Between the clients, weighed by curvature: neither of them, nor their mean.
    weights = [n for n in result.state_dict if n.endswith(("conv2.weight", "conv_proj.weight"))]
    assert weights
    for weight in weights:
        merged = result.state_dict[weight].flatten()
        ours, theirs = (update.parameters[weight].flatten() for update in updates)
        assert not torch.allclose(merged, (ours + theirs) / 2, atol=1e-4)
        assert torch.cosine_similarity(merged, ours + theirs, dim=0) > 0.5


def test_the_recipe_takes_every_network():
    assert get_args(ModelName) == ("auto", *MODELS)
    images = load_images("digits", None)
    for name in MODELS:
        flags = settle(Flags(dataset="digits", model=name, accelerator="cpu"), images)
        assert flags.model == name
        assert flags.epochs > 0


def test_patches_need_an_image_that_can_be_cut():
    with pytest.raises(ValueError, match="multiple of 4"):
        build_model("vit", 3, 30, 10)


def test_scaled_initialisation_keeps_the_signal_through_many_blocks():
    torch.manual_seed(0)
    model = ResNet(widths=(16,), blocks=(20,), scaled=True)
    images = torch.randn(8, 3, 16, 16)
    ratio = model.blocks(model.stem(images)).square().mean() / model.stem(images).square().mean()
    assert 0.3 < ratio < 10


def test_same_seed_same_weights():
    torch.manual_seed(0)
    first = build_model("resnet8", 3, 32, 10)
    torch.manual_seed(0)
    second = build_model("resnet8", 3, 32, 10)
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_unknown_model_names_the_choices():
    with pytest.raises(ValueError, match="'vgg'; choose one of lenet, cnn, resnet8, resnet18, "):
        build_model("vgg", 3, 32, 10)


@pytest.mark.parametrize("name", ["lenet", "cnn"])
def test_image_too_small(name):
    with pytest.raises(ValueError, match="at least 16"):
        build_model(name, 3, 8, 10)
