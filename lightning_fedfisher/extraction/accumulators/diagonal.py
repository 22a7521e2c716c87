"""Sums of squared per-sample gradients: the diagonal of the Fisher."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.extraction.accumulators.base import GradientAccumulator
from lightning_fedfisher.extraction.accumulators.squared_gradients import (
    add_squared_gradients,
    sum_of_squares,
)
from lightning_fedfisher.extraction.tracing.recorder import LayerCall


class DiagonalAccumulator(GradientAccumulator):
    """Squared entries of per-sample gradients, exact for every layer type.

    Example:
        >>> import torch
        >>> from lightning_fedfisher.curvature import Diagonal
        >>> from lightning_fedfisher.layers import Layer
        >>> layer = Layer("fc", (("fc.weight", (1, 2)),))
        >>> accumulator = DiagonalAccumulator(layer, Diagonal, like=torch.ones(()))
        >>> accumulator.add_gradients(torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]))
        >>> accumulator.finish(accumulator.sums, count=2).diagonal()
        tensor([[ 5., 10.]])
    """

    @override
    def add(self, calls: Sequence[LayerCall], samples: int) -> None:
        add_squared_gradients(self.sums["values"], calls, samples)

    @override
    def add_gradients(self, gradients: Tensor) -> None:
        self.sums["values"] += sum_of_squares(gradients)
