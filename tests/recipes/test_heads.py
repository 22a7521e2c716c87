"""The last layer of a pre-trained network: found, put behind other features, scaled."""

import pytest
import torch
from simulation.heads import (
    last_linear,
    scaled_to_logits,
    with_layer_features,
    with_random_features,
)
from torch import nn
from torchvision.models import resnet18

from lightning_fedfisher import LayerFeatures, RandomFeatures


def _network():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 3), nn.Dropout()))


def test_the_last_linear_layer_is_found():
    path, head = last_linear(_network())
    assert path == "2.0"
    assert head.out_features == 3
    with pytest.raises(ValueError, match="ReLU has no linear layer"):
        last_linear(nn.ReLU())


def test_the_head_alone_is_another():
    torch.manual_seed(0)
    network = _network().eval()
    before = torch.random.get_rng_state()
    expanded, again = with_random_features(network, 10), with_random_features(network, 10)
    assert torch.equal(torch.random.get_rng_state(), before)
    features, head = expanded[2][0]
    assert isinstance(features, RandomFeatures)
    assert (head.in_features, head.out_features) == (16, 3)
    assert torch.equal(head.weight, again[2][0][1].weight)
    assert torch.equal(expanded[0].weight, network[0].weight)
    assert isinstance(network[2][0], nn.Linear)
    assert expanded(torch.randn(5, 4)).shape == (5, 3)


def test_blocks_take_the_place_of_the_last_features():
    network = resnet18(num_classes=3).eval()
    x = torch.rand(2, 3, 32, 32)
    expanded = with_layer_features(network, x)
    features, head = expanded
    assert isinstance(features, LayerFeatures)
    assert isinstance(features.network.fc, nn.Identity)
    assert isinstance(network.fc, nn.Linear)
    assert head.in_features == 2 * (64 + 128 + 256 + 512)
    assert expanded(x).shape == (2, 3)


def test_what_was_fitted_is_scaled():
    before = {"body": torch.ones(2), "head": torch.zeros(2)}
    scaled = scaled_to_logits(before, before | {"head": torch.tensor([0.5, -1.0])})
    assert scaled["head"].tolist() == [5.0, -10.0]
    assert scaled["body"].tolist() == [1.0, 1.0]
