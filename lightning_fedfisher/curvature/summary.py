"""What a client's curvature of a layer says, in a few numbers: how much, and in how many ways."""

from __future__ import annotations

import math

import torch

from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.results.record import LayerCurvature

_RANKS = 33
# The side of a factor beyond which its eigenvalues cost seconds.
_LARGEST_SIDE = 1024


def summarize_curvature(layer: str, curvature: Curvature, spectrum: bool = True) -> LayerCurvature:
    """Sums a layer's curvature up.

    Args:
        layer: its name.
        curvature: of one client.
        spectrum: whether to find eigenvalues, which takes most of the time.

    Returns:
        Trace, effective rank and the eigenvalues at 33 evenly spaced ranks (at all, if there are
        fewer); no eigenvalues where they would have to be found for a factor of more than 1024
        rows. All zero where there is no curvature.
    """
    trace, norm = float(curvature.trace()), float(curvature.norm())
    # In float64, and divided before squared: eigenvalues may be as small as numbers get.
    rank = (trace / norm) ** 2 if norm > 0 else 0.0
    return LayerCurvature(layer, trace, rank, _spectrum(curvature) if spectrum else [])


def _spectrum(curvature: Curvature) -> list[float]:
    tensors = curvature.tensors()
    factors = [tensors[name] for name, form in curvature.tensor_roles.items() if form == "factor"]
    if any(len(factor) > _LARGEST_SIDE for factor in factors):
        return []
    values = curvature.eigenvalues().flatten().sort(descending=True).values
    count = min(_RANKS, len(values))
    ranks = torch.linspace(0, len(values) - 1, count, dtype=torch.float64).round().long()
    return [value if math.isfinite(value) else math.inf for value in values[ranks].tolist()]
