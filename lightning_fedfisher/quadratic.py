"""The merge objective and its solvers: pure linear algebra, one layer at a time.

For one layer, clients ``k`` with shares ``p_k``, weights ``W_k`` and curvatures ``F_k`` define

    Q(W) = sum_k p_k <W - W_k, F_k (W - W_k)>.

FedAvg, RegMean, Fisher merging and FedFisher (arXiv 2403.12329, equation 7) are all this problem.
Solvers start at the average ``sum_k p_k W_k``, and a direction (of either factor, for Kronecker
products) that no client has information on stays there.

The clients are gone through one after the other, their weights once, so that a sequence that reads
curvature from disk will do (`spill.Spilled`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.curvature import Curvature, PseudoInverse


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


@dataclass(frozen=True)
class Quadratic:
    """The merge problem of one layer.

    Attributes:
        shares: ``p_k``, positive, one for each client.
        weights: ``W_k``, matrices of one shape.
        curvatures: ``F_k``, acting on that shape; may be read from disk at every use.
    """

    shares: Sequence[float]
    weights: Sequence[Tensor]
    curvatures: Sequence[Curvature]

    def __post_init__(self) -> None:
        if not len(self.shares) == len(self.weights) == len(self.curvatures) > 0:
            raise ValueError("a merge needs one share, weight matrix and curvature for each client")
        kinds = sorted({curvature.kind for curvature in self.curvatures})
        if len(kinds) > 1:
            raise ValueError(f"the clients' curvatures of one layer are of several kinds: {kinds}")
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
            pull += share * _norm(force)
            gradient += share * force
            objective += share * _dot(offset, force)
        return pull, gradient, objective

    @property
    def pull(self) -> float:
        """``sum_k p_k ||F_k (W_avg - W_k)||``, how hard the clients pull at the average.

        The measure of what is a small gradient: the gradient is the sum of these pulls, and where
        they cancel it is rounding. Zero only if no client wants to move.
        """
        return self._at_average[0]

    def objective(self, matrix: Tensor) -> float:
        """``Q(W)``.

        Args:
            matrix: ``W``.

        Returns:
            The value, zero only where every client is content.
        """
        _, gradient, objective = self._at_average
        return objective + _dot(matrix - self.average, gradient + self.gradient(matrix))

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

    @cached_property
    def mean(self) -> Curvature:
        """One curvature that stands for the clients' sum, and that can be inverted."""
        return type(self.curvatures[0]).mean(self.curvatures, self.shares)

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
        return Quadratic(self.shares, weights, _InDouble(self.curvatures, weights[0].device))


class _InDouble(Sequence[Curvature]):
    """Curvature in float64, one at a time."""

    def __init__(self, curvatures: Sequence[Curvature], device: torch.device) -> None:
        self._curvatures, self._device = curvatures, device

    def __len__(self) -> int:
        return len(self._curvatures)

    def __getitem__(self, index: Any) -> Any:
        return self._curvatures[index].to(self._device, torch.float64)


def _dot(one: Tensor, other: Tensor) -> float:
    # In float64: the curvature of a certain client may be fainter than float32's smallest square.
    return float((one.double() * other.double()).sum())


def _norm(matrix: Tensor) -> float:
    return math.sqrt(_dot(matrix, matrix))


class Solver(ABC):
    """An iteration toward the minimum of one layer's quadratic.

    Attributes:
        problem: the quadratic.
        weights: the iterate; the average at first.
        iterations: steps made so far.
        finished: whether further steps would change nothing that matters.
    """

    def __init__(self, problem: Quadratic) -> None:
        """Starts at the average.

        Args:
            problem: the quadratic.
        """
        self.problem = problem
        self.weights = problem.average
        self.iterations = 0
        self.finished = False
        self._pull = problem.pull

    def advance(self, iterations: int) -> None:
        """Makes some steps, or fewer if it finishes earlier.

        Args:
            iterations: steps at most.
        """
        for _ in range(iterations):
            if self.finished:
                return
            self._step()
            self.iterations += 1

    @property
    def residual(self) -> float:
        """Norm of the gradient at the iterate, relative to the clients' pulls at the average."""
        if self._pull == 0:
            return 0.0
        return _norm(self.problem.gradient(self.weights)) / self._pull

    @abstractmethod
    def _step(self) -> None:
        """Moves `weights`, and sets `finished` if that was the last step."""


class ClosedForm(Solver):
    """``sum p F W / sum p F``, entry by entry: the minimum in one step, for elementwise curvature.

    Fisher merging (Matena & Raffel, 2022), and FedAvg with the identity.
    """

    def __init__(self, problem: Quadratic) -> None:
        """Refuses curvature that couples weights.

        Args:
            problem: the quadratic.

        Raises:
            ValueError: if a curvature is not elementwise.
        """
        if not all(curvature.elementwise for curvature in problem.curvatures):
            kind = problem.curvatures[0].kind
            raise ValueError(f"there is no closed form with {kind} curvature: it couples weights")
        super().__init__(problem)

    def _step(self) -> None:
        total = self.problem.curve(torch.ones_like(self.weights))
        correction = self.problem.gradient(self.weights) / total
        self.weights = self.weights - torch.where(total > 0, correction, 0.0)
        self.finished = True


class ConjugateGradient(Solver):
    """Preconditioned conjugate gradients (Hestenes & Stiefel, 1952) to a relative residual.

    The preconditioner is the pseudo-inverse of the clients' mean curvature. For Kronecker factors
    that takes tens of steps where plain conjugate gradients take a thousand, and directions of
    either factor in which no client has curvature stay where they are: at the average. The residual
    is kept in the preconditioner's coordinates, which takes half the turning. If float32 cannot
    reach the tolerance, it goes on in float64.
    """

    # Steps without progress after which it cannot be hoped for.
    _PATIENCE = 100
    # A true residual that agrees with the one carried along.
    _AGREES = 1.1

    def __init__(self, problem: Quadratic, tolerance: float = 1e-4, cut: float = 1e-6) -> None:
        """Starts at the average.

        Args:
            problem: the quadratic.
            tolerance: `residual` at which it is finished.
            cut: share of the mean curvature's largest eigenvalue (for a Kronecker product, of
                either factor) up to which a direction counts as one without curvature.
        """
        super().__init__(problem)
        self._tolerance, self._cut = tolerance, cut
        self._inverse: PseudoInverse | None = None
        self.finished = _norm(problem.gradient(self.weights)) <= tolerance * self._pull
        if not self.finished:
            self._begin()

    @property
    @override
    def residual(self) -> float:
        """Norm of the gradient in directions with curvature, relative to the clients' pulls."""
        if self._pull == 0:
            return 0.0
        return _norm(self._true_residual()) / self._pull

    def _true_residual(self) -> Tensor:
        residual = -self.problem.gradient(self.weights)
        if self._inverse is None:
            return residual
        return self._inverse.support * self._inverse.turn(residual)

    def _begin(self) -> None:
        """Starts, or starts anew, at the iterate."""
        if self._inverse is None:
            self._inverse = self.problem.mean.pseudo_inverse(self._cut)
        self._residual = self._true_residual()
        self._started_at = self._least = _norm(self._residual)
        self._waited = 0
        self.finished = self._least <= self._AGREES * self._tolerance * self._pull
        preconditioned = self._inverse.inverse * self._residual
        self._direction = self._inverse.back(preconditioned)
        self._squared = _dot(self._residual, preconditioned)

    @override
    def _step(self) -> None:
        assert self._inverse is not None
        curved = self.problem.curve(self._direction)
        bend = _dot(self._direction, curved)
        if bend <= 0:  # only rounding is left of this direction's curvature
            self._check()
            return
        step = self._squared / bend
        self.weights = self.weights + step * self._direction
        turned = self._inverse.support * self._inverse.turn(curved)
        self._residual = self._residual - step * turned
        norm = _norm(self._residual)
        self._waited = 0 if norm < self._least else self._waited + 1
        self._least = min(norm, self._least)
        if norm <= self._tolerance * self._pull or self._waited > self._PATIENCE:
            self._check()
            return
        preconditioned = self._inverse.inverse * self._residual
        squared = _dot(self._residual, preconditioned)
        along = squared / self._squared
        self._direction = self._inverse.back(preconditioned) + along * self._direction
        self._squared = squared

    def _check(self) -> None:
        """Compares with the true residual: done, once more, in float64, or as far as it goes."""
        before = self._started_at
        self._begin()
        if self.finished or self._started_at < before / 2:
            return
        if self.weights.dtype == torch.float64:
            self.finished = True
            return
        self.problem, self.weights = self.problem.in_double(), self.weights.double()
        self._inverse = None
        self._begin()


def exact_solver(problem: Quadratic, cut: float = 1e-6) -> Solver:
    """The solver that reaches the minimum: the closed form where there is one.

    Args:
        problem: the quadratic.
        cut: of `ConjugateGradient`.

    Returns:
        A solver at the average.
    """
    elementwise = all(curvature.elementwise for curvature in problem.curvatures)
    return ClosedForm(problem) if elementwise else ConjugateGradient(problem, cut=cut)


class PublishedServer(Solver):
    """The server of FedFisher as its authors run it: Adam-like steps without bias correction.

    ``m = 0.9 m + g``, ``v = 0.99 v + g * g``, ``W -= 0.01 m / d``, with the damping 0.01 either
    inside the root (K-FAC) or added to it (diagonal). It never finishes by itself.
    """

    def __init__(self, problem: Quadratic, *, damping_inside: bool) -> None:
        """Starts at the average.

        Args:
            problem: the quadratic.
            damping_inside: whether ``d`` is ``sqrt(v + 0.01)`` rather than ``sqrt(v) + 0.01``.
        """
        super().__init__(problem)
        self._damping_inside = damping_inside
        self._mean = torch.zeros_like(self.weights)
        self._square = torch.zeros_like(self.weights)

    def _step(self) -> None:
        gradient = self.problem.gradient(self.weights)
        self._mean = 0.9 * self._mean + gradient
        self._square = 0.99 * self._square + gradient.square()
        inside, outside = (0.01, 0.0) if self._damping_inside else (0.0, 0.01)
        scale = (self._square + inside).sqrt() + outside
        self.weights = self.weights - 0.01 * self._mean / scale
