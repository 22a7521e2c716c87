"""Computes the diagonal Fisher by BackPACK, for the models it supports.

This is the only file that imports BackPACK (Dangel et al., 2020). Its first-order extension is
enough for all Fisher types, since a Fisher is the second moment of back-propagated directions.

`BackpackDiagonal` stands in for `ModelAccumulator` where the diagonal alone is asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from backpack import backpack, extend
from backpack.context import CTX
from backpack.extensions import SumGradSquared
from torch import Tensor, nn

from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.curvature.diagonal import Diagonal
from lightning_fedfisher.curvature.registry import CurvatureType
from lightning_fedfisher.extraction.layer_report import LayerReport
from lightning_fedfisher.extraction.layer_types.conv_geometry import ConvGeometry
from lightning_fedfisher.extraction.tracing.model_trace import ModelTrace
from lightning_fedfisher.layers import Layer

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SUPPORTED = (nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, *_CONVOLUTIONS)


class BackpackError(RuntimeError):
    """Says that BackPACK does not support a model, which showed only when it ran."""


def why_unsupported(model: nn.Module, layers: Sequence[Layer], trace: ModelTrace) -> str:
    """Tells why BackPACK would give wrong per-sample gradients for a model, or none.

    Args:
        model: The model in eval mode.
        layers: All layers of the model.
        trace: What a traced forward pass showed about the model.

    Returns:
        The first reason found. Empty if BackPACK supports the model.
    """
    for layer in layers:
        module = model.get_submodule(layer.module_name)
        kind = type(module)
        if layer.name in trace.unseen:
            return f"{layer.name}: {trace.unseen[layer.name]}"
        supported = any(isinstance(module, t) and kind.forward is t.forward for t in _SUPPORTED)
        whole = len(list(module.parameters())) == len(layer.parameters)
        if not supported or not whole:
            return f"{layer.name} is a {kind.__name__}"
        if layer.name not in trace.plain:
            return (
                f"{layer.name} runs more than once, or on an input that is of another precision or "
                "does not have samples first"
            )
        if isinstance(module, _CONVOLUTIONS):
            if module.padding_mode != "zeros":
                return f"{layer.name} has padding_mode={module.padding_mode!r}"
            if any(before != after for before, after in _padding(module)):
                return f"{layer.name} has uneven padding"
    return ""


class BackpackDiagonal:
    """Sums of the squared per-sample gradients that BackPACK saves on each parameter."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        """Extends the modules of the layers.

        Args:
            model: A copy of the model in eval mode, to be thrown away, because what BackPACK does
                to a module cannot be undone.
            layers: All layers of the model.
        """
        self._layers = layers
        self._parameters = dict(model.named_parameters())
        self._sums = {
            layer.name: torch.zeros_like(layer.join(self._parameters)).detach() for layer in layers
        }
        for module in model.modules():
            # A change of an input in place would make BackPACK's backward hooks fail.
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]
            # BackPACK reads numbers only, and would take "same" or "valid" wrongly.
            if isinstance(module, _CONVOLUTIONS):
                module.padding = tuple(before for before, _ in _padding(module))
        known = len(CTX.hook_handles)
        for layer in layers:
            extend(model.get_submodule(layer.module_name))
        # BackPACK keeps the handles of all hooks it ever made, and with them every extended model.
        del CTX.hook_handles[known:]

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Gives the context manager to run a forward pass in.

        Raises:
            BackpackError: If an output of a layer is changed in place.
        """
        try:
            yield
        except RuntimeError as error:
            # PyTorch has no type for this error: its own full backward hooks, which BackPACK uses,
            # do not allow a change in place of what they return.
            if "BackwardHookFunction" not in str(error):
                raise
            raise BackpackError("an output is changed in place") from error

    def backward(
        self,
        batch: Any,
        logits: Tensor,
        directions: Sequence[Tensor],
        uniforms: Tensor | None = None,
    ) -> None:
        """Back-propagates directions and adds up the squares of their per-sample gradients.

        Args:
            batch: The batch that was run; not needed.
            logits: Result of the forward pass inside `watch`.
            directions: Gradients at the logits, each of their shape.
            uniforms: Not needed: a diagonal is computed from all positions.

        Raises:
            BackpackError: If a parameter is used without its module.
        """
        for index, direction in enumerate(directions):
            more = index + 1 < len(directions)
            with backpack(SumGradSquared(), retain_graph=more), warnings.catch_warnings():
                # The first layer's hook fires without gradients at its input, which need none.
                warnings.filterwarnings("ignore", "Full backward hook is firing")
                # A plain sum over samples, so that nothing is divided by their number.
                torch.autograd.backward(logits, direction, retain_graph=more)
            for layer in self._layers:
                self._sums[layer.name] += layer.join(self._take(layer))

    def finish(
        self, curvature: CurvatureType, total: Callable[[Tensor], Tensor], count: int
    ) -> dict[str, Curvature]:
        """Turns the sums into a curvature.

        Args:
            curvature: Always ``"diagonal"``.
            total: Adds a tensor up over all processes.
            count: Number of samples of all processes together.

        Returns:
            The block of every layer, by layer name.
        """
        return {name: Diagonal(total(values) / count) for name, values in self._sums.items()}

    def layer_reports(self, curvature: CurvatureType) -> tuple[LayerReport, ...]:
        """Tells that all layers are computed by BackPACK.

        Args:
            curvature: Always ``"diagonal"``.

        Returns:
            One report for each layer, in their order.
        """
        return tuple(LayerReport(layer, curvature, "backpack") for layer in self._layers)

    def _take(self, layer: Layer) -> dict[str, Tensor]:
        """Takes what BackPACK saved off the parameters of a layer, by parameter name."""
        taken = {}
        for name in layer.parameter_names:
            parameter = self._parameters[name]
            if not hasattr(parameter, "sum_grad_squared"):
                raise BackpackError(f"{name} is used without its module")
            taken[name] = parameter.__dict__.pop("sum_grad_squared")
            parameter.grad = None
        return taken


def _padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[tuple[int, int], ...]:
    """Gives the zeros before and after each spatial dimension, in numbers."""
    return ConvGeometry.from_arguments(
        module.kernel_size, module.stride, module.padding, module.dilation
    ).padding
