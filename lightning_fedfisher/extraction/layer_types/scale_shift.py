"""A scale and shift of each feature: of normalisations, and of biases without their weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.extraction.layer_types.base import LayerType, flatten_positions


@dataclass(frozen=True)
class ScaleShift(LayerType):
    """``y = weight * normalize(x) + bias``, feature by feature; either part may be missing.

    Attributes:
        normalize: Gives the quantity that is scaled from the input. None if there is no scale.
        has_shift: Whether there is a shift.
        features: Shape of the scale or shift.
        trailing: Whether features are the last dimensions of an input, as for layer norm, rather
            than the one after the batch, as for batch norm.

    Example:
        >>> layer = ScaleShift(lambda x: 2 * x, has_shift=True, features=(2,), trailing=True)
        >>> inputs, gradients = torch.tensor([[1.0, 2.0]]), torch.ones(1, 1, 2)
        >>> layer.per_sample_gradients(inputs, gradients, samples=1)
        tensor([[[2., 1.],
                 [4., 1.]]])
    """

    normalize: Callable[[Tensor], Tensor] | None
    has_shift: bool
    features: tuple[int, ...]
    trailing: bool
    title: ClassVar[str] = "a scale or shift"

    @override
    def sample_axes(self, ndim: int) -> int:
        return ndim - len(self.features) if self.trailing else 1

    @override
    def per_sample_gradients(self, inputs: Tensor, gradients: Tensor, samples: int) -> Tensor:
        columns = []
        if self.normalize is not None:
            columns.append(self._sum_positions(gradients * self.normalize(inputs), samples))
        if self.has_shift:
            columns.append(self._sum_positions(gradients, samples))
        count = len(gradients) * samples
        # A parameter of any shape is a matrix by its first dimension; two of them are two columns.
        matrix = columns[0] if len(columns) == 1 else torch.stack(columns, dim=2)
        return matrix.reshape(count, self.features[0], -1)

    def _sum_positions(self, tensor: Tensor, samples: int) -> Tensor:
        """Sums over everything but directions, samples and features."""
        count = len(tensor) * samples
        if self.trailing:
            return tensor.reshape(count, -1, *self.features).sum(1)
        return flatten_positions(tensor.flatten(0, 1), count).sum(2)


def lone_bias(bias: Tensor | None, trailing: bool) -> LayerType | None:
    """Gives the layer type of a bias that is trained without its weight.

    Args:
        bias: The bias, or None.
        trailing: Whether it is added to the last dimension rather than to the one after the batch.

    Returns:
        A shift, or None if there is no bias.
    """
    return None if bias is None else ScaleShift(None, True, tuple(bias.shape), trailing)
