"""The diagonal Fisher through BackPACK, for the models it supports.

The only file that imports BackPACK (Dangel et al., 2020). Its first-order extension is enough for
every Fisher type, because a Fisher is the second moment of back-propagated residual directions, and
it works wherever a layer's own gradient does: behind any activation, residual or concatenation.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from backpack import backpack, extend
from backpack.context import CTX
from backpack.extensions import SumGradSquared
from torch import Tensor, nn

from lightning_fedfisher.extraction.layer_types.conv_geometry import ConvGeometry
from lightning_fedfisher.extraction.tracing.model_trace import ModelTrace
from lightning_fedfisher.layers import Layer

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SUPPORTED = (nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, *_CONVOLUTIONS)


class BackpackError(RuntimeError):
    """BackPACK turns out not to support the model after all."""


def why_not(model: nn.Module, layers: Sequence[Layer], survey: ModelTrace) -> str | None:
    """Why BackPACK has no right per-sample gradients of a model, or None if it has.

    Args:
        model: in eval mode.
        layers: of the model.
        survey: of the same model.

    Returns:
        The first reason found.
    """
    for layer in layers:
        module = model.get_submodule(layer.module_name)
        kind = type(module)
        if layer.name in survey.unseen:
            return f"{layer.name}: {survey.unseen[layer.name]}"
        supported = any(isinstance(module, t) and kind.forward is t.forward for t in _SUPPORTED)
        whole = {name for name, _ in module.named_parameters()}
        if not supported or len(whole) != len(layer.parameters):
            return f"{layer.name} is a {kind.__name__}"
        if layer.name not in survey.plain:
            return (
                f"{layer.name} runs more than once, or on an input that is of another precision or "
                "does not have samples first"
            )
        if isinstance(module, _CONVOLUTIONS):
            if module.padding_mode != "zeros":
                return f"{layer.name} has padding_mode={module.padding_mode!r}"
            if any(before != after for before, after in _padding(module)):
                return f"{layer.name} has uneven padding"
    return None


class BackpackDiagonal:
    """Sums of squared per-sample gradients that BackPACK saves on each parameter.

    Attributes:
        sums: for each layer the tensor ``values``, additive over batches and processes.
    """

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
                module.padding = tuple(before for before, _ in _padding(module))
        known = len(CTX.hook_handles)
        for layer in layers:
            extend(model.get_submodule(layer.module_name))
        # BackPACK keeps every handle it ever made, for good; these die with the copy.
        del CTX.hook_handles[known:]
        self.sums = {
            layer.name: {"values": torch.zeros_like(layer.join(self._parameters)).detach()}
            for layer in layers
        }

    def backward(self, batch: Any, logits: Tensor, directions: Sequence[Tensor]) -> None:
        """Back-propagates directions and adds what they leave on each parameter.

        Args:
            batch: not needed.
            logits: of the batch whose forward pass just ran.
            directions: of the logits' shape.
        """
        for index, direction in enumerate(directions):
            more = index + 1 < len(directions)
            with backpack(SumGradSquared(), retain_graph=more), warnings.catch_warnings():
                # A first layer's hook fires without gradients at its input, which it does not need.
                warnings.filterwarnings("ignore", "Full backward hook is firing")
                # A sum over samples, so that BackPACK's fields carry no 1 / samples.
                torch.autograd.backward(logits, direction, retain_graph=more)
            for layer in self._layers:
                self.sums[layer.name]["values"] += layer.join(self._take(layer))

    def _take(self, layer: Layer) -> dict[str, Tensor]:
        """Takes what was saved off the layer's parameters, by parameter name."""
        taken = {}
        for name in layer.parameter_names:
            parameter = self._parameters[name]
            if not hasattr(parameter, "sum_grad_squared"):
                raise BackpackError(f"{name} is used without its module")
            taken[name] = parameter.__dict__.pop("sum_grad_squared")
            parameter.grad = None
        return taken


def _padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[tuple[int, int], ...]:
    """Zeros before and after, in each spatial dimension, where the padding may be a word."""
    window = ConvGeometry.of(module.kernel_size, module.stride, module.padding, module.dilation)
    return window.padding
