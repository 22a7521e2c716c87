"""The merge objective: pure linear algebra, one layer at a time.

For one layer, clients ``k`` with shares ``p_k``, weights ``W_k`` and curvatures ``F_k`` define

    Q(W) = sum_k p_k <W - W_k, F_k (W - W_k)>.

FedAvg, RegMean, Fisher merging and FedFisher (arXiv 2403.12329, equation 7) are all this problem.

The clients are gone through one after the other, their weights once, so that a sequence that reads
curvature from disk will do (`disk_cache.OnDiskCurvatures`).
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.curvature.base import Curvature


def average(shares: Sequence[float], weights: Sequence[Tensor]) -> Tensor:
    """Weighted average, exact to the bit where all clients agree.

    Args:
        shares: one positive number for each client, of any sum.
        weights: tensors of one shape.

    Returns:
        ``sum_k p_k W_k`` with the shares scaled to sum to one.
    """
    total, first = sum(shares), weights[0]
    offsets = zip(shares[1:], weights[1:], strict=True)
    return first + sum((p / total * (w - first) for p, w in offsets), torch.zeros_like(first))


class LazyCurvatures(Sequence[Curvature], ABC):
    """Curvatures made anew at every use.

    Attributes:
        kinds: the type of each, without making it.
    """

    kinds: Sequence[type[Curvature]]

    @override
    def __len__(self) -> int:
        return len(self.kinds)


@dataclass(frozen=True)
class Quadratic:
    """The merge problem of one layer.

    Attributes:
        shares: ``p_k``, positive, one for each client.
        weights: ``W_k``, matrices of one shape.
        curvatures: ``F_k``, acting on that shape, of one kind; may be `LazyCurvatures`.
        kind: their type.
    """

    shares: Sequence[float]
    weights: Sequence[Tensor]
    curvatures: Sequence[Curvature]
    kind: type[Curvature] = field(init=False)

    def __post_init__(self) -> None:
        if not len(self.shares) == len(self.weights) == len(self.curvatures) > 0:
            raise ValueError("a merge needs one share, weight matrix and curvature for each client")
        found = self.curvatures
        kinds = set(found.kinds if isinstance(found, LazyCurvatures) else [type(f) for f in found])
        if len(kinds) > 1:
            names = sorted(kind.kind for kind in kinds)
            raise ValueError(f"the clients' curvatures of one layer are of several kinds: {names}")
        object.__setattr__(self, "kind", kinds.pop())
        total = sum(self.shares)
        object.__setattr__(self, "shares", tuple(share / total for share in self.shares))

    @cached_property
    def average(self) -> Tensor:
        """``sum_k p_k W_k``."""
        return average(self.shares, self.weights)

    @cached_property
    def _latest(self) -> list[Tensor]:
        """Where the gradient was asked for last, and what it was: there it is asked for again."""
        return [self.average, self._at_average[1]]

    @cached_property
    def _at_average(self) -> tuple[float, Tensor, float]:
        """The clients' pulls, the gradient and the objective at the average."""
        pull, gradient, objective = 0.0, torch.zeros_like(self.average), 0.0
        for share, weights, curvature in zip(
            self.shares, self.weights, self.curvatures, strict=True
        ):
            offset = self.average - weights
            force = curvature.apply(offset)
            pull += share * norm(force)
            gradient += share * force
            objective += share * dot(offset, force)
        return pull, gradient, objective

    @property
    def pull(self) -> float:
        """``sum_k p_k ||F_k (W_avg - W_k)||``, how hard the clients pull at the average.

        The measure of what is a small gradient: the gradient is the sum of these pulls, and where
        they cancel it is rounding. Zero only if no client wants to move.
        """
        return self._at_average[0]

    def look(self, matrix: Tensor) -> tuple[float, Tensor]:
        """`objective` and `gradient` in one pass over the curvatures.

        Args:
            matrix: ``W``.

        Returns:
            Both.
        """
        _, at_average, objective = self._at_average
        gradient = self.gradient(matrix)
        # Rounding may leave a little less than nothing.
        return max(0.0, objective + dot(matrix - self.average, at_average + gradient)), gradient

    def objective(self, matrix: Tensor) -> float:
        """``Q(W)``.

        Args:
            matrix: ``W``.

        Returns:
            The value, zero only where every client is content.
        """
        return self.look(matrix)[0]

    def gradient(self, matrix: Tensor) -> Tensor:
        """``sum_k p_k F_k (W - W_k)``, half the gradient of ``Q``.

        Args:
            matrix: ``W``.

        Returns:
            A matrix of the same shape.
        """
        if self._latest[0] is not matrix:
            self._latest[:] = matrix, self._at_average[1] + self.curve(matrix - self.average)
        return self._latest[1]

    def distances(self, matrix: Tensor) -> list[float]:
        """``<W - W_k, F_k (W - W_k)>^(1/2)``: from each client, in its own norm.

        Args:
            matrix: ``W``.

        Returns:
            One for each client.
        """
        offsets = (matrix - weights for weights in self.weights)
        # Rounding may leave a little less than nothing.
        return [
            math.sqrt(max(0.0, dot(offset, curvature.apply(offset))))
            for offset, curvature in zip(offsets, self.curvatures, strict=True)
        ]

    @cached_property
    def mean(self) -> Curvature:
        """One curvature that stands for the clients' sum, and that can be inverted."""
        return self.kind.mean(self.curvatures, self.shares)

    def curve(self, matrix: Tensor) -> Tensor:
        """``sum_k p_k F_k V``, the Hessian's action on a direction ``V``.

        Args:
            matrix: ``V``.

        Returns:
            A matrix of the same shape.
        """
        terms = zip(self.shares, self.curvatures, strict=True)
        return sum((p * f.apply(matrix) for p, f in terms), torch.zeros_like(matrix))

    def in_double(self) -> Quadratic:
        """The same problem in float64, its curvature converted at every use."""
        weights = [matrix.double() for matrix in self.weights]
        return Quadratic(self.shares, weights, _InDouble(self, weights[0].device))


class _InDouble(LazyCurvatures):
    """Curvature in float64, one at a time."""

    def __init__(self, problem: Quadratic, device: torch.device) -> None:
        self._curvatures, self._device = problem.curvatures, device
        self.kinds = [problem.kind] * len(problem.curvatures)

    @override
    def __getitem__(self, index: Any) -> Any:
        return self._curvatures[index].to(self._device, torch.float64)


def dot(one: Tensor, other: Tensor) -> float:
    """The sum of two tensors' products, entry by entry."""
    # In float64: the curvature of a certain client may be fainter than float32's smallest square.
    return float((one.double() * other.double()).sum())


def norm(matrix: Tensor) -> float:
    """The root of the sum of squares."""
    return math.sqrt(dot(matrix, matrix))
