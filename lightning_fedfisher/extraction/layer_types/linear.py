"""Linear layers, at any number of positions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.extraction.layer_types.base import (
    FunctionCall,
    KroneckerLayer,
    append_ones,
    take_positions,
)
from lightning_fedfisher.extraction.layer_types.scale_shift import lone_bias


@dataclass(frozen=True)
class Linear(KroneckerLayer):
    """``y = x W'`` for features in the last dimension, with any dimensions before it.

    Attributes:
        has_bias: Whether the last column of the matrix is a bias.

    Example:
        >>> import torch
        >>> inputs, gradients = torch.tensor([[1.0, 2.0]]), torch.tensor([[[3.0]]])
        >>> Linear(has_bias=True).per_sample_gradients(inputs, gradients, samples=1)
        tensor([[[3., 6., 3.]]])
    """

    has_bias: bool

    @override
    def sample_axes(self, ndim: int) -> int:
        return ndim - 1

    @override
    def channel_axis(self, ndim: int) -> int | None:
        return ndim - 1

    @override
    def is_outer_product(self, inputs: Tensor, samples: int) -> bool:
        return inputs.numel() == samples * inputs.shape[-1]

    @override
    def count_positions(self, inputs: Tensor, gradient: Tensor) -> int:
        return inputs.numel() // inputs.shape[-1]

    @override
    def unfold_inputs(self, inputs: Tensor, samples: int) -> Tensor:
        by_position = inputs.reshape(samples, -1, inputs.shape[-1])
        return (append_ones(by_position, 2) if self.has_bias else by_position).mT

    @override
    def unfold_inputs_at(self, inputs: Tensor, samples: int, positions: Tensor) -> Tensor:
        by_position = take_positions(inputs.reshape(samples, -1, inputs.shape[-1]).mT, positions)
        return append_ones(by_position, 1) if self.has_bias else by_position

    @override
    def unfold_gradient(self, gradient: Tensor, samples: int) -> Tensor:
        return gradient.reshape(samples, -1, gradient.shape[-1]).mT


def read_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> FunctionCall | None:
    """Reads the arguments of `torch.nn.functional.linear`; None if the weight is a vector."""
    if weight.ndim != 2:
        return None
    return FunctionCall(inputs, weight, bias, Linear, lone_bias(bias, trailing=True))


def read_known_linear(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor
) -> FunctionCall | None:
    """Reads the arguments of `recurrence.known_linear`."""
    return read_linear(inputs, weight, bias)
