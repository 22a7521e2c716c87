"""Sums for K-FAC of embeddings: how often each token is read, and a factor over columns."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from lightning_fedfisher.extraction.accumulators.base import Accumulator
from lightning_fedfisher.extraction.layer_types.base import SparseLayer
from lightning_fedfisher.extraction.tracing.recorder import LayerCall


class EmbeddingAccumulator(Accumulator):
    """Token frequencies, and the second moment of the gradients at an embedding's output."""

    @override
    def add(self, calls: Sequence[LayerCall], samples: int) -> None:
        positions = sum(call.inputs.numel() for call in calls) / samples
        for call in calls:
            assert isinstance(call.layer_type, SparseLayer)
            _, tokens, rows = call.layer_type.nonzero_rows(call.inputs, call.gradients, samples)
            # Every direction reads the same tokens, and must count them only once.
            frequency = 1 / (positions * len(call.gradients))
            frequencies = rows.new_full((len(tokens),), frequency)
            self.sums["row_values"].index_add_(0, tokens, frequencies)
            self.sums["column_factor"].addmm_(rows.mT, rows)
