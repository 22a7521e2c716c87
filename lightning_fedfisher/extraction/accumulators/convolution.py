"""Sums for K-FAC of convolutions whose patches' factor is channels times kernel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.extraction.accumulators.kronecker import KroneckerAccumulator


class ConvolutionAccumulator(KroneckerAccumulator):
    """The row factor, and the partial traces of the patches' factor over kernel and channels."""

    @override
    def _add_inputs(self, unfolded: Tensor, scale: float) -> None:
        elements = self._layer.kernel
        channels = self._layer.inputs // elements
        # Without the ones of a bias column.
        inputs = unfolded[:, : channels * elements]
        patches = inputs.reshape(len(inputs), channels, elements, -1)
        self._grams["channel_factor"].add(patches.flatten(2), scale / elements)
        by_element = patches.permute(0, 2, 1, 3).flatten(2)
        self._grams["kernel_factor"].add(by_element, scale / channels)

    @override
    def finish(self, sums: Mapping[str, Tensor], count: int) -> Curvature:
        # Both hold the trace of the patches' factor; it counts once.
        kernel = sums["kernel_factor"]
        mean = kernel.diagonal().mean()
        scaled = torch.where(mean > 0, kernel * (count / mean), 0.0)
        return super().finish({**sums, "kernel_factor": scaled}, count)
