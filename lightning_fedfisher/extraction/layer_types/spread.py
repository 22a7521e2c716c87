"""Parameters of which every sample gets a copy: tokens, position embeddings, layer scales."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import vjp, vmap
from typing_extensions import override

from lightning_fedfisher.extraction.layer_types.base import LayerType

Rebuild = Callable[[Tensor], Tensor]
"""Computes, from a parameter, the tensor that samples get a copy of."""


@dataclass(frozen=True)
class Spread(LayerType):
    """A parameter, reshaped or indexed, that is expanded over the samples.

    Attributes:
        parameter: The parameter.
        rebuild: Computes the tensor that is expanded.
        start: Columns of the layer's matrix before those of the parameter.
        columns: Number of columns of the layer's matrix.

    Example:
        >>> layer = Spread(torch.zeros(2), lambda parameter: parameter, start=0, columns=1)
        >>> gradients = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
        >>> layer.per_sample_gradients(torch.zeros(2, 2), gradients, samples=2).tolist()
        [[[1.0], [2.0]], [[3.0], [4.0]]]
    """

    parameter: Tensor
    rebuild: Rebuild
    start: int
    columns: int
    title: ClassVar[str] = "a parameter of which every sample gets a copy"

    @override
    def per_sample_gradients(self, inputs: Tensor, gradients: Tensor, samples: int) -> Tensor:
        parameter, count = self.parameter.detach().to(gradients), len(gradients) * samples
        found = gradients.reshape(count, -1, *gradients.shape[2:]).sum(1)
        tensor, pull_back, *_ = vjp(self.rebuild, parameter)
        found = _sum_to(found, tensor.shape)
        if tensor is not parameter:
            (found,) = vmap(pull_back)(found)
        rows = parameter.shape[0] if parameter.ndim else 1
        found = found.reshape(count, rows, -1)
        after = self.columns - self.start - found.shape[2]
        return torch.nn.functional.pad(found, (self.start, after))

    def forgotten(self) -> Spread:
        """Gives the same layer type without anything of the model that it was seen in."""
        return replace(self, parameter=self.parameter.detach().to("meta"), rebuild=torch.clone)

    @override
    def peak_numel(self, inputs: Tensor, gradients: Tensor) -> int:
        return max(gradients.numel(), gradients.shape[1] * self.parameter.numel())


def _sum_to(gradients: Tensor, shape: torch.Size) -> Tensor:
    """Sums gradients of expanded copies over the dimensions that were expanded.

    Args:
        gradients: A tensor of shape ``(count, *rest)``: of a tensor that was expanded to
            ``(samples, *rest)``.
        shape: Shape of that tensor before.

    Returns:
        A tensor of shape ``(count, *shape)``.
    """
    rest = gradients.shape[1:]
    own = (*(1 for _ in range(1 + len(rest) - len(shape))), *shape)[1:]
    summed = [axis for axis, size in enumerate(own, 1) if size == 1 and rest[axis - 1] > 1]
    if summed:
        gradients = gradients.sum(summed)
    return gradients.reshape(len(gradients), *shape) if math.prod(shape) else gradients
