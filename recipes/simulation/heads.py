"""The last layer of a pre-trained network: found, put behind other features, scaled to logits."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_fedfisher import LayerFeatures, RandomFeatures

# Outputs of a closed-form head lie between 0 and 1. As logits they tell little. This is about right
# for few classes and for many.
_SCALE = 10.0


def last_linear(network: nn.Module) -> tuple[str, nn.Linear]:
    """Finds the last linear layer of a network, in the order of its modules.

    Args:
        network: that has one.

    Returns:
        Path and layer.
    """
    layers = [
        (path, module) for path, module in network.named_modules() if isinstance(module, nn.Linear)
    ]
    if not layers:
        raise ValueError(f"{type(network).__name__} has no linear layer at its end")
    return layers[-1]


def with_random_features(network: nn.Module, number: int) -> nn.Module:
    """Puts random features before the head of a network.

    Args:
        network: with a linear layer at its end; it is not changed.
        number: of nonlinear features.

    Returns:
        A copy with a new head behind them.
    """
    path, head = last_linear(network)
    behind = _headed(RandomFeatures(head.in_features, number), head)
    if not path:  # the network is its own head
        return behind
    expanded = copy.deepcopy(network)
    expanded.set_submodule(path, behind)
    return expanded


def with_layer_features(network: nn.Module, example: Tensor) -> nn.Module:
    """Puts a head on what the blocks of a network compute, instead of its last features.

    Args:
        network: with a linear layer at its end; it is not changed.
        example: inputs of a sample or more.

    Returns:
        A copy with a new head behind it.
    """
    path, head = last_linear(network)
    body = copy.deepcopy(network)
    body.set_submodule(path, nn.Identity())
    return _headed(LayerFeatures(body, example), head)


def _headed(features: LayerFeatures | RandomFeatures, head: nn.Linear) -> nn.Module:
    """Puts a new head behind features, for the classes of another."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(features, nn.Linear(features.out_features, head.out_features))


def scaled_to_logits(
    before: Mapping[str, Tensor], fitted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Scales the weights that a fit in closed form changed, to logits.

    Args:
        before: state dict of the network.
        fitted: the same with a fitted head.

    Returns:
        The state dict to tell probabilities with, and to fine-tune from.
    """
    return {
        name: tensor if torch.equal(tensor, before[name]) else _SCALE * tensor
        for name, tensor in fitted.items()
    }
