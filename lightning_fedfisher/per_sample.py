"""Diagonal and dense Fisher from per-sample gradients, through BackPACK.

The only file that imports BackPACK (Dangel et al., 2020). Its first-order extensions are enough for
every Fisher type, because a Fisher is the second moment of back-propagated residual directions, and
they work wherever a layer's own gradient does: behind any activation, residual or concatenation.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from backpack import backpack, extend
from backpack.context import CTX
from backpack.extensions import BatchGrad, SumGradSquared
from backpack.extensions.backprop_extension import BackpropExtension
from torch import Tensor, nn

from lightning_fedfisher.curvature import Dense, Diagonal
from lightning_fedfisher.layers import (
    Layer,
    UnsupportedModelError,
    is_plain,
    no_gradient_reaches,
    same_padding,
)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SUPPORTED = (nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, *_CONVOLUTIONS)


def _why_not_padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> str | None:
    if module.padding_mode != "zeros":
        return f"BackPACK does not know padding_mode={module.padding_mode!r}: use zeros"
    if any(before != after for before, after in same_padding(module)):
        return (
            'padding="same" of an even kernel is uneven, which BackPACK does not know: use numbers'
        )
    return None


class _PerSampleSums(ABC):
    """Sums over samples of something BackPACK saves on each parameter at a backward pass."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        """Extends the layers' modules.

        Args:
            model: a throw-away copy in eval mode: BackPACK cannot be taken off again.
            layers: the layers to collect.
        """
        self._layers = layers
        self._parameters = dict(model.named_parameters())
        # A module that changes its input in place would invalidate BackPACK's backward hooks.
        for module in model.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]
            if isinstance(module, _CONVOLUTIONS):
                # BackPACK would read a padding given as a word wrongly.
                module.padding = tuple(before for before, _ in same_padding(module))
        known = len(CTX.hook_handles)
        for layer in layers:
            extend(model.get_submodule(layer.module_name))
        # BackPACK keeps every handle it ever made, for good; these die with the copy.
        del CTX.hook_handles[known:]
        self.sums = {layer.name: self._zeros(layer) for layer in layers}

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        """Why BackPACK has no per-sample gradients of a module, or None if it has."""
        if is_plain(module, _SUPPORTED):
            return _why_not_padding(module) if isinstance(module, _CONVOLUTIONS) else None
        return 'BackPACK has no per-sample gradients of it: merge it with curvature="identity"'

    def add(self, logits: Tensor, directions: Tensor) -> None:
        """Back-propagates directions and adds what they leave on each parameter.

        Args:
            logits: of the batch whose forward pass just ran, shape ``(samples, classes)``.
            directions: of shape ``(n, samples, classes)``.
        """
        for index, direction in enumerate(directions):
            more = index + 1 < len(directions)
            with backpack(self._extension(), retain_graph=more), warnings.catch_warnings():
                # A first layer's hook fires without gradients at its input, which it does not need.
                warnings.filterwarnings("ignore", "Full backward hook is firing")
                # A sum over samples, so that BackPACK's fields carry no 1 / samples.
                torch.autograd.backward(logits, direction, retain_graph=more)
            unreached = {
                layer.name
                for layer in self._layers
                if any(self._parameters[name].grad is None for name in layer.parameter_names)
            }
            if unreached:
                raise UnsupportedModelError(no_gradient_reaches(unreached))
            for layer in self._layers:
                self._collect(layer)

    @abstractmethod
    def _extension(self) -> BackpropExtension:
        """The BackPACK extension to run at each backward pass."""

    @abstractmethod
    def _zeros(self, layer: Layer) -> dict[str, Tensor]:
        """The layer's sums before any sample."""

    @abstractmethod
    def _collect(self, layer: Layer) -> None:
        """Adds what the extension saved on the layer's parameters."""

    def _take(self, layer: Layer, field: str) -> dict[str, Tensor]:
        """Takes a saved field off the layer's parameters, by parameter name."""
        taken = {}
        for name in layer.parameter_names:
            parameter = self._parameters[name]
            taken[name] = parameter.__dict__.pop(field)
            parameter.grad = None
        return taken


class DiagonalSums(_PerSampleSums):
    """Sums of squared per-sample gradients."""

    def _extension(self) -> BackpropExtension:
        return SumGradSquared()

    def _zeros(self, layer: Layer) -> dict[str, Tensor]:
        return {"values": torch.zeros_like(layer.join(self._parameters)).detach()}

    def _collect(self, layer: Layer) -> None:
        self.sums[layer.name]["values"] += layer.join(self._take(layer, "sum_grad_squared"))

    @staticmethod
    def finish(layer: Layer, sums: dict[str, Tensor], count: int) -> Diagonal:
        """The curvature of one layer, from its sums over `count` samples."""
        return Diagonal(sums["values"] / count)


class DenseSums(_PerSampleSums):
    """Sums of outer products of per-sample gradients: exact blocks, for small layers only."""

    def _extension(self) -> BackpropExtension:
        return BatchGrad()

    def _zeros(self, layer: Layer) -> dict[str, Tensor]:
        entries = layer.shape[0] * layer.shape[1]
        like = self._parameters[layer.parameter_names[0]]
        return {"matrix": like.detach().new_zeros(entries, entries)}

    def _collect(self, layer: Layer) -> None:
        gradients = self._take(layer, "grad_batch")
        rows = layer.shape[0]
        joined = torch.cat([g.reshape(len(g), rows, -1) for g in gradients.values()], dim=2)
        flat = joined.flatten(1)
        self.sums[layer.name]["matrix"].addmm_(flat.mT, flat)

    @staticmethod
    def finish(layer: Layer, sums: dict[str, Tensor], count: int) -> Dense:
        """The curvature of one layer, from its sums over `count` samples."""
        return Dense(sums["matrix"] / count, layer.shape)
