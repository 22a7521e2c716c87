"""Sums of outer products of per-sample gradients: the full Fisher of a small layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.extraction.accumulators.base import GradientAccumulator
from lightning_fedfisher.extraction.accumulators.per_sample_gradients import (
    in_chunks,
    per_sample_gradients,
)
from lightning_fedfisher.extraction.tracing.recorder import LayerCall


class DenseAccumulator(GradientAccumulator):
    """Outer products ``g g'`` of per-sample gradients, flattened row by row."""

    @override
    def add(self, calls: Sequence[LayerCall], samples: int) -> None:
        for chunk, n in in_chunks(calls, samples, math.prod(self._layer.shape)):
            self.add_gradients(per_sample_gradients(chunk, n))

    @override
    def add_gradients(self, gradients: Tensor) -> None:
        flat = gradients.flatten(1)
        self.sums["matrix"].addmm_(flat.mT, flat)
