"""Sums of squared per-sample gradients in an eigenbasis: the eigenvalues of EKFAC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.curvature.kronecker import Eigenbased, EigenKronecker
from lightning_fedfisher.extraction.accumulators.base import GradientAccumulator
from lightning_fedfisher.extraction.accumulators.squared_gradients import (
    add_squared_gradients,
    sum_of_squares,
    to_bases,
)
from lightning_fedfisher.extraction.tracing.recorder import LayerCall


class SpectrumAccumulator(GradientAccumulator):
    """Squared entries of per-sample gradients in the eigenbasis of the Kronecker factors.

    (George et al., 2018, "Fast Approximate Natural Gradient Descent in a Kronecker-factored
    Eigenbasis", section 3.)
    """

    def __init__(self, basis: Eigenbased) -> None:
        """Starts at zero.

        Args:
            basis: A curvature in the eigenbasis. Its spectrum will be replaced.
        """
        self._curvature = basis
        # An embedding has no basis over tokens.
        rows = basis.row_basis if isinstance(basis, EigenKronecker) else None
        self._bases = rows, basis.column_basis
        self._sums = {"spectrum": torch.zeros_like(basis.spectrum)}

    @override
    def add(self, calls: Sequence[LayerCall], samples: int) -> None:
        add_squared_gradients(self.sums["spectrum"], calls, samples, *self._bases)

    @override
    def add_gradients(self, gradients: Tensor) -> None:
        self.sums["spectrum"] += sum_of_squares(to_bases(gradients, *self._bases))

    @override
    def finish(self, sums: Mapping[str, Tensor], count: int) -> Curvature:
        return self._curvature.with_spectrum(sums["spectrum"] / count)
