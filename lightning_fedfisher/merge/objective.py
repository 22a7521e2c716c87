"""The merge objective of one layer: a sum of the clients' quadratics.

For one layer, clients ``k`` with weights ``p_k`` in the merge, parameters ``W_k`` and curvatures
``F_k`` define

    Q(W) = sum_k p_k <W - W_k, F_k (W - W_k)>.

FedAvg, RegMean, Fisher merging and FedFisher (arXiv 2403.12329, equation 7) all minimise it, with
different curvatures.

Curvatures are read one client after the other, so that they may be made or read from disk at each
use (`LazyCurvatures`, `disk_cache.OnDiskCurvatures`).
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.curvature.linalg import frobenius_norm, inner_product


def average(client_weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """Averages tensors, exactly to the bit where all clients agree.

    Args:
        client_weights: A positive number for each client, of any sum.
        tensors: A tensor for each client, all of one shape.

    Returns:
        ``sum_k p_k W_k``, with the client weights scaled to sum to one.

    Example:
        >>> average([1, 3], [torch.tensor([0.0]), torch.tensor([4.0])])
        tensor([3.])
    """
    total, first = sum(client_weights), tensors[0]
    offsets = zip(client_weights[1:], tensors[1:], strict=True)
    return first + sum((p / total * (w - first) for p, w in offsets), torch.zeros_like(first))


def weighted_sum(
    client_weights: Sequence[float], curvatures: Sequence[Curvature], direction: Tensor
) -> Tensor:
    """Multiplies a matrix by ``sum_k p_k F_k``, one curvature after the other.

    Args:
        client_weights: A number for each client.
        curvatures: A curvature for each client.
        direction: A matrix of the shape that they act on.

    Returns:
        A matrix of the same shape.

    Example:
        >>> from lightning_fedfisher.curvature import Diagonal
        >>> curvatures = [Diagonal(torch.ones(1, 1)), Diagonal(torch.full((1, 1), 3.0))]
        >>> weighted_sum([0.5, 0.5], curvatures, torch.ones(1, 1))
        tensor([[2.]])
    """
    total = torch.zeros_like(direction)
    for p, curvature in zip(client_weights, curvatures, strict=True):
        total.add_(curvature.apply(direction), alpha=p)
    return total


class LazyCurvatures(Sequence[Curvature], ABC):
    """The curvatures of all clients, each made anew at every use.

    Attributes:
        kinds: The class of each curvature, known without making it.
    """

    kinds: Sequence[type[Curvature]]

    @override
    def __len__(self) -> int:
        return len(self.kinds)


class Point(NamedTuple):
    """What one pass over the clients tells of a point ``W``.

    Attributes:
        gradient: ``sum_k p_k F_k (W - W_k)``, half the gradient of ``Q``.
        pull: ``sum_k p_k ||F_k (W - W_k)||``: what the gradient would be if no clients cancelled.
        distances: ``<W - W_k, F_k (W - W_k)>^(1/2)`` for each client: how far it is, in its own
            norm.
        objective: ``Q(W)``, zero only where no client wants to move.
    """

    gradient: Tensor
    pull: float
    distances: tuple[float, ...]
    objective: float


class LeastSquares(NamedTuple):
    """What is known of a layer beside its quadratic if the clients' weights are fits of labels.

    Attributes:
        samples: Number of samples of all clients.
        squared_errors: Squared error that each client's own fit leaves, as a mean over its samples.
            With the quadratic, they give the squared error of any weights over all samples.
        observations: Labels that each client saw, as a mean over its samples.
        has_bias: Whether the last column is a bias, whose input is one.
    """

    samples: int
    squared_errors: tuple[float, ...]
    observations: tuple[float, ...]
    has_bias: bool


class Quadratic:
    """The merge objective of one layer, with its gradient and Hessian-vector product.

    Attributes:
        client_weights: ``p_k``, a positive number for each client; they sum to one.
        weights: ``W_k``, a matrix for each client, all of one shape.
        curvatures: ``F_k``, all of one kind, acting on that shape.
        kind: The class of the curvatures.
        fit: What is known beside it if the weights are least-squares fits; None if they are not.

    Example:
        >>> from lightning_fedfisher.curvature.diagonal import Diagonal
        >>> weights = [torch.zeros(1, 1), torch.ones(1, 1)]
        >>> curvatures = [Diagonal(torch.tensor([[1.0]])), Diagonal(torch.tensor([[3.0]]))]
        >>> problem = Quadratic([1, 1], weights, curvatures)
        >>> problem.objective(torch.tensor([[0.75]]))
        0.375
        >>> problem.gradient(torch.tensor([[0.75]]))
        tensor([[0.]])
    """

    def __init__(
        self,
        client_weights: Sequence[float],
        weights: Sequence[Tensor],
        curvatures: Sequence[Curvature],
        fit: LeastSquares | None = None,
    ) -> None:
        """Checks that the parts belong together; reads no curvature.

        Args:
            client_weights: A positive number for each client, of any sum.
            weights: A matrix for each client, all of one shape.
            curvatures: A curvature for each client; may be `LazyCurvatures`.
            fit: What is known beside it if the weights are least-squares fits of the labels.

        Raises:
            ValueError: If the lengths differ or the curvatures are of several kinds.
        """
        if not len(client_weights) == len(weights) == len(curvatures) > 0:
            raise ValueError(
                "a merge needs one client weight, weight matrix and curvature for each client"
            )
        if isinstance(curvatures, LazyCurvatures):
            kinds = set(curvatures.kinds)
        else:
            kinds = {type(curvature) for curvature in curvatures}
        if len(kinds) > 1:
            names = sorted(kind.kind for kind in kinds)
            raise ValueError(f"the clients' curvatures of one layer are of several kinds: {names}")
        total = sum(client_weights)
        self.client_weights = tuple(weight / total for weight in client_weights)
        self.weights, self.curvatures, self.fit = weights, curvatures, fit
        self.kind: type[Curvature] = kinds.pop()

    @cached_property
    def average(self) -> Tensor:
        """``sum_k p_k W_k``, where solvers start."""
        return average(self.client_weights, self.weights)

    def at(self, matrix: Tensor) -> Point:
        """Finds out all about a point, in one pass.

        Args:
            matrix: ``W``.
        """
        gradient, pull, squares = torch.zeros_like(self.average), 0.0, list[float]()
        for p, weights, curvature in zip(
            self.client_weights, self.weights, self.curvatures, strict=True
        ):
            offset = matrix - weights
            force = curvature.apply(offset)
            gradient.add_(force, alpha=p)
            pull += p * norm(force)
            squares.append(max(0.0, dot(offset, force)))  # rounding may leave less than zero
        objective = sum(p * square for p, square in zip(self.client_weights, squares, strict=True))
        return Point(gradient, pull, tuple(map(math.sqrt, squares)), objective)

    @cached_property
    def start(self) -> Point:
        """`at` the `average`.

        A gradient counts as small by the `Point.pull` there: the gradient is the sum of the
        clients' terms, and rounding where they cancel. That is zero only if no client wants to
        move.
        """
        return self.at(self.average)

    def objective(self, matrix: Tensor) -> float:
        """``Q(W)``, zero only where no client wants to move.

        Args:
            matrix: ``W``.
        """
        return self.at(matrix).objective

    def gradient(self, matrix: Tensor) -> Tensor:
        """``sum_k p_k F_k (W - W_k)``, half the gradient of ``Q``.

        Args:
            matrix: ``W``.

        Returns:
            A matrix of the same shape.
        """
        return self.start.gradient + self.matvec(matrix - self.average)

    @cached_property
    def mean_curvature(self) -> Curvature:
        """One curvature that stands for the clients' sum and can be inverted."""
        return self.kind.mean(self.curvatures, self.client_weights)

    def matvec(self, direction: Tensor) -> Tensor:
        """``sum_k p_k F_k V``, the Hessian-vector product.

        Args:
            direction: ``V``, a matrix of the layer's shape.

        Returns:
            A matrix of the same shape.
        """
        return weighted_sum(self.client_weights, self.curvatures, direction)

    def in_double(self) -> Quadratic:
        """The same objective in float64; curvatures are converted at every use."""
        weights = [matrix.double() for matrix in self.weights]
        curvatures = _InDouble(self.curvatures, self.kind, weights[0].device)
        return Quadratic(self.client_weights, weights, curvatures, self.fit)


class _InDouble(LazyCurvatures):
    """Curvatures converted to float64, one at a time."""

    def __init__(
        self, curvatures: Sequence[Curvature], kind: type[Curvature], device: torch.device
    ) -> None:
        self._curvatures, self._device = curvatures, device
        self.kinds = [kind] * len(curvatures)

    @override
    def __getitem__(self, index: Any) -> Any:
        return self._curvatures[index].to(self._device, torch.float64)


def dot(one: Tensor, other: Tensor) -> float:
    """The sum of the products of two tensors' entries, in float64."""
    # The curvature of a certain client may be fainter than float32's smallest square.
    return float(inner_product(one, other))


def norm(matrix: Tensor) -> float:
    """The root of the sum of squares, in float64."""
    return float(frobenius_norm(matrix))
