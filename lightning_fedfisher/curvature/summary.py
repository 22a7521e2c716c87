"""Sums up a layer's curvature in a few numbers, for records, logs and charts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from lightning_fedfisher.curvature.base import Curvature

# Ranks at which eigenvalues are recorded: 32 steps from the largest to the smallest.
_RANKS = 33
# Largest factor, in rows, whose eigenvalues are computed: those of a larger one take seconds.
_MAX_FACTOR_SIZE = 1024


@dataclass(frozen=True)
class CurvatureSummary:
    """How much the loss minds changes of a layer, and in how many directions.

    Attributes:
        layer: Name of the layer.
        trace: Sum of the eigenvalues: how much the loss minds a change of the layer.
        effective_rank: ``(sum of the eigenvalues)^2 / sum of their squares``: the number of
            directions in which it does, between 1 and the number of weights. 0 if there is no
            curvature.
        spectrum: Eigenvalues at evenly spaced ranks, the largest first. Empty if not computed.
    """

    layer: str
    trace: float
    effective_rank: float
    spectrum: list[float] = field(default_factory=list)


def summarize_curvature(
    layer: str, curvature: Curvature, spectrum: bool = True
) -> CurvatureSummary:
    """Sums up one client's curvature of a layer.

    Args:
        layer: Name of the layer.
        curvature: Its curvature.
        spectrum: Whether to compute eigenvalues, which takes most of the time.

    Returns:
        Trace and effective rank, and the eigenvalues at 33 evenly spaced ranks, or all if there are
        fewer. The eigenvalues are left out if a factor has more than 1024 rows.

    Example:
        >>> from lightning_fedfisher.curvature import Diagonal
        >>> summarize_curvature("fc", Diagonal(torch.tensor([[1.0, 3.0]])))
        CurvatureSummary(layer='fc', trace=4.0, effective_rank=1.6, spectrum=[3.0, 1.0])
    """
    trace, norm = float(curvature.trace()), float(curvature.norm())
    # Divided before it is squared: the square of a small trace could vanish.
    rank = (trace / norm) ** 2 if norm > 0 else 0.0
    return CurvatureSummary(layer, trace, rank, _spectrum(curvature) if spectrum else [])


def _spectrum(curvature: Curvature) -> list[float]:
    """Computes eigenvalues at evenly spaced ranks, unless that would take seconds."""
    tensors = curvature.tensors()
    factors = [tensors[name] for name, role in curvature.tensor_roles.items() if role == "factor"]
    if any(len(factor) > _MAX_FACTOR_SIZE for factor in factors):
        return []
    values = curvature.eigenvalues().flatten().sort(descending=True).values
    count = min(_RANKS, len(values))
    ranks = torch.linspace(0, len(values) - 1, count, dtype=torch.float64).round().long()
    return [value if math.isfinite(value) else math.inf for value in values[ranks].tolist()]
