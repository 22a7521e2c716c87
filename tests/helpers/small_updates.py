"""Updates in memory of whatever model, with a curvature that needs no data."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from lightning_fedfisher import ClientUpdate
from lightning_fedfisher.curvature.base import Identity
from lightning_fedfisher.layers import find_layers
from lightning_fedfisher.update import UpdateHeader

ASKED = {  # the curvature that an extraction is asked for, by the kind that it gives
    "diagonal": "diagonal",
    "dense": "dense",
    "input_gram": "input_gram",
    "kronecker": "kfac",
    "transposed_kronecker": "kfac",
    "convolution_kronecker": "kfac",
    "embedding_kronecker": "kfac",
    "ekfac": "ekfac",
    "transposed_ekfac": "ekfac",
    "embedding_ekfac": "ekfac",
}


def header_of(model, kind="identity", **changes):
    layers = find_layers(model)
    kinds = {layer.name: kind for layer in layers}
    curvature = "kfac" if kind == "kronecker" else kind
    plain = UpdateHeader(7, curvature, "", "categorical", 0, layers, kinds)
    return dataclasses.replace(plain, **changes)


def update_of(model, **changes):
    blocks = {layer.name: Identity(layer.shape) for layer in find_layers(model)}
    return ClientUpdate.from_model(model, header_of(model, **changes), blocks)


def linear(**changes):
    torch.manual_seed(0)
    return nn.Linear(3, 2, **changes)


class Shared(nn.Module):
    """A frozen layer, and two that share a weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3).requires_grad_(False)
        self.second, self.third = nn.Linear(3, 3), nn.Linear(3, 3)
        self.third.weight = self.second.weight
