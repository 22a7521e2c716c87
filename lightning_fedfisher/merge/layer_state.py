"""How far each layer of a merge is: a row of numbers a layer, alike on all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fedfisher.layers import Layer

DISTANCES = slice(3, -1)
"""Columns of a status after iterations, objective and residual: each client's, once it is done."""

DONE = -1
"""The last column."""

CONVERGED, ENDED = 1.0, 2.0
"""What it holds: zero before, and `ENDED` if short of the tolerance."""


def waiting(layers: int, clients: int) -> Tensor:
    """The status of layers not begun.

    Args:
        layers: how many.
        clients: how many.

    Returns:
        Of shape ``(layers, 4 + clients)``, in float64.
    """
    return torch.zeros(layers, 4 + clients, dtype=torch.float64)


def summary(status: Tensor) -> dict[str, float]:
    """What is logged of all layers together.

    Args:
        status: of all layers, as from `waiting`.

    Returns:
        The most iterations, the sum of the objectives and the largest residual.
    """
    iterations, objectives, residuals = status[:, :3].T
    return {
        "iterations": float(iterations.max()),
        "objective": float(objectives.sum()),
        "residual": float(residuals.max()),
    }


def by_layer(layers: Sequence[Layer], status: Tensor) -> dict[str, float]:
    """What is logged of each layer.

    Args:
        layers: of the model.
        status: of all layers, as from `waiting`.

    Returns:
        Iterations and residual of every layer.
    """
    logged: dict[str, float] = {}
    for layer, (iterations, _, residual, *_) in zip(layers, status.tolist(), strict=True):
        logged |= {f"iterations/{layer.name}": iterations, f"residual/{layer.name}": residual}
    return logged


def unsolved(layers: Sequence[Layer], status: Tensor, converges: bool) -> str:
    """Tells of layers that are not where the method promises them to be.

    Args:
        layers: of the model.
        status: of all layers, as from `waiting`.
        converges: whether the method promises the minimum, rather than a number of steps.

    Returns:
        Their residuals and iterations, and what to do; empty if there are none.
    """
    if not converges and status[:, DONE].all():
        return ""
    short = [
        f"{layer.name} (residual {residual:.1e} after {iterations:.0f} iterations)"
        for layer, (iterations, _, residual, *_, done) in zip(layers, status.tolist(), strict=True)
        if not done or (converges and done == ENDED)
    ]
    if not short:
        return ""
    return (
        f"the merge has not converged in {len(short)} of {len(layers)} layers: {', '.join(short)}. "
        "Use Trainer(max_epochs=-1), and a larger max_iterations if that is not enough"
    )
