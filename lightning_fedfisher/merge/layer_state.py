"""How far the merge of each layer has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

import torch
from torch import Tensor

from lightning_fedfisher.merge.solvers import Solver


class Progress(IntEnum):
    """Where a layer's solver stands."""

    OPEN = 0
    """It has steps to make, or the layer waits for its turn."""
    CONVERGED = 1
    """The residual is below the tolerance, or the closed form is computed."""
    STOPPED = 2
    """It ran out of iterations before."""


@dataclass(frozen=True)
class LayerState:
    """How far the merge of one layer has come, alike on all ranks.

    Attributes:
        distances: How far the layer was moved from each client, in the client's own Fisher norm;
            zeros until the layer is done.
        iterations: Steps that its solver has made.
        objective: Value of the layer's quadratic.
        residual: Norm of the gradient, relative to the clients' gradients at the average; 1 for a
            layer that waits for its turn.
        progress: Where its solver stands.
        bits: Bits of the numbers that its solver works with: 32, or 64 where float32 could not
            reach the tolerance, and for models in float64. 0 for a layer that waits.
        agreement: How much of what the clients compute the merged weights keep
            (`Solver.agreement`); 0 until the layer is done.

    Example:
        >>> state = LayerState.waiting(clients=2)
        >>> state.done, state.residual
        (False, 1.0)
        >>> LayerState.from_row(state.to_row()) == state
        True
    """

    distances: tuple[float, ...]
    iterations: int = 0
    objective: float = 0.0
    residual: float = 1.0
    progress: Progress = Progress.OPEN
    bits: int = 0
    agreement: float = 0.0

    @classmethod
    def of(cls, solver: Solver, max_iterations: int) -> Self:
        """The state of a layer whose merge has begun.

        Args:
            solver: Its solver.
            max_iterations: Steps after which the solver stops.
        """
        progress, distances = Progress.OPEN, (0.0,) * len(solver.problem.weights)
        agreement = 0.0
        if solver.finished or solver.iterations >= max_iterations:
            progress = Progress.CONVERGED if solver.converged else Progress.STOPPED
            distances = solver.point.distances
            agreement = solver.agreement
        bits = 8 * solver.weights.dtype.itemsize
        numbers = solver.iterations, solver.point.objective, solver.residual
        return cls(distances, *numbers, progress, bits, agreement)

    @classmethod
    def waiting(cls, clients: int) -> Self:
        """The state of a layer whose merge has not begun.

        Args:
            clients: Number of clients.
        """
        return cls((0.0,) * clients)

    @staticmethod
    def width(clients: int) -> int:
        """Numbers in a `to_row`.

        Args:
            clients: Number of clients.
        """
        return 6 + clients

    @property
    def done(self) -> bool:
        """Whether the layer's solver makes no further step."""
        return self.progress is not Progress.OPEN

    @property
    def waits(self) -> bool:
        """Whether the layer's merge has not begun."""
        return not self.done and self.iterations == 0

    def to_row(self) -> Tensor:
        """The state as numbers, so that ranks can add up what each of them knows.

        Returns:
            A vector of ``6 + clients`` numbers in float64.
        """
        counts = [self.iterations, self.progress, self.bits]
        numbers = [*counts, self.objective, self.residual, self.agreement, *self.distances]
        return torch.tensor(numbers, dtype=torch.float64)

    @classmethod
    def from_row(cls, row: Tensor) -> Self:
        """Rebuilds a state from `to_row`.

        Args:
            row: A vector of ``6 + clients`` numbers.
        """
        iterations, progress, bits = row[:3].int().tolist()
        objective, residual, agreement, *distances = row[3:].tolist()
        numbers = iterations, objective, residual
        return cls(tuple(distances), *numbers, Progress(progress), bits, agreement)


def summarize(states: Sequence[LayerState]) -> dict[str, float]:
    """Sums up all layers in the numbers that are logged after each epoch.

    Args:
        states: The state of every layer.

    Returns:
        The most ``iterations`` of any layer, the sum of the layers' ``objective``, and the largest
        ``residual``.
    """
    objectives = torch.tensor([state.objective for state in states], dtype=torch.float64)
    return {
        "iterations": float(max(state.iterations for state in states)),
        "objective": float(objectives.sum()),
        "residual": max(state.residual for state in states),
    }


def describe_unsolved(names: Sequence[str], states: Sequence[LayerState], converges: bool) -> str:
    """Names the layers that are not where the method promises them to be.

    Args:
        names: The layers' names.
        states: The state of every layer.
        converges: Whether the method promises the minimum rather than a number of steps.

    Returns:
        One sentence with residuals, iterations and a remedy; empty if there is nothing to tell.
    """
    if not converges and all(state.done for state in states):
        return ""
    short = [
        f"{name} (residual {state.residual:.1e} after {state.iterations} iterations)"
        for name, state in zip(names, states, strict=True)
        if not state.done or (converges and state.progress is Progress.STOPPED)
    ]
    if not short:
        return ""
    stopped = all(state.done for state in states)
    remedy = "Raise max_iterations" if stopped else "Let it run on, with Trainer(max_epochs=-1)"
    where = f"in {len(short)} of {len(states)} layers: {', '.join(short)}"
    return f"the merge has not converged {where}. {remedy}"
