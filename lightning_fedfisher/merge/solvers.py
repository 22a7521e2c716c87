"""Solvers of the merge objective: closed form, conjugate gradients, and the published server.

They start at the average ``sum_k p_k W_k``. A direction that no client has information on (of
either factor, for Kronecker products) stays there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise

import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.curvature.base import Identity
from lightning_fedfisher.curvature.linalg import PseudoInverse
from lightning_fedfisher.merge.eigenbasis import MatvecWithin
from lightning_fedfisher.merge.objective import Point, Quadratic, dot, norm


class Solver(ABC):
    """An iteration toward the minimum of one layer's quadratic.

    A solver of your own implements `_step`: it changes `weights`, and sets `finished` after its
    last step.

    Attributes:
        problem: The quadratic.
        weights: The current iterate, a matrix; the clients' average at first.
        iterations: Steps made so far.
        finished: Whether further steps would change nothing that matters.

    Example:
        >>> class Downhill(Solver):
        ...     def _step(self):
        ...         self.weights -= 0.1 * self.problem.gradient(self.weights)
        >>> from lightning_fedfisher.curvature import Diagonal
        >>> curvatures = [Diagonal(torch.tensor([[1.0]])), Diagonal(torch.tensor([[3.0]]))]
        >>> solver = Downhill(Quadratic([1, 1], [torch.zeros(1, 1), torch.ones(1, 1)], curvatures))
        >>> solver.advance(100)
        >>> solver.weights
        tensor([[0.7500]])
    """

    def __init__(self, problem: Quadratic) -> None:
        """Starts at the average.

        Args:
            problem: The quadratic to minimise.
        """
        self.problem = problem
        self.weights = problem.average.clone()
        self.iterations = 0
        self.finished = False
        start = problem.start
        self._scale = start.pull
        # With the gradient g at the average V, Q(0) = Q(V) - 2 <V, g> + <V, sum_k p_k F_k V>.
        self._without_average = start.objective - 2 * dot(problem.average, start.gradient)
        # What is known of the iterate. A step makes it unknown.
        self._point: Point | None = start
        self._point_before: Point | None = None  # the same where the current step began

    @property
    def converged(self) -> bool:
        """Whether it reached the minimum, up to its tolerance."""
        return self.finished

    def advance(self, iterations: int) -> None:
        """Makes some steps, or fewer if it finishes earlier.

        Args:
            iterations: Steps to make at most.
        """
        for _ in range(iterations):
            if self.finished:
                return
            self._point_before, self._point = self._point, None
            self._step()
            self.iterations += 1

    @property
    def point(self) -> Point:
        """All about the iterate, in at most one pass over the curvatures."""
        if self._point is None:
            self._point = self.problem.at(self.weights)
        return self._point

    @property
    def residual(self) -> float:
        """Norm of the gradient at the iterate, relative to `Point.pull` at the average."""
        return norm(self._visible(self.point.gradient)) / self._scale if self._scale else 0.0

    @property
    def agreement(self) -> float:
        """How much of what the clients' weights compute is left at the iterate.

        It is ``1 - Q(W) / Q(0)``: 1 where all clients compute the same as far as they can tell, and
        0 where no weights at all would do as well. 1 if no client's weights do anything. One pass
        over the curvatures.
        """
        average = self.problem.average
        whole = self._without_average + dot(average, self.problem.matvec(average))
        return 1 - self.point.objective / whole if whole > 0 else 1.0

    def _visible(self, gradient: Tensor) -> Tensor:
        """The part of a gradient in directions where some client has curvature."""
        return gradient

    @abstractmethod
    def _step(self) -> None:
        """Moves `weights`, and sets `finished` after the last step."""


class ClosedForm(Solver):
    """The minimum in one step, for curvature that acts on each weight alone.

    It is ``sum p F W / sum p F``, entry by entry: Fisher merging (Matena & Raffel, 2022), or FedAvg
    with the identity.

    Example:
        >>> from lightning_fedfisher.curvature import Diagonal
        >>> curvatures = [Diagonal(torch.tensor([[1.0]])), Diagonal(torch.tensor([[3.0]]))]
        >>> weights = [torch.zeros(1, 1), torch.ones(1, 1)]
        >>> solver = ClosedForm(Quadratic([1, 1], weights, curvatures))
        >>> solver.advance(1)
        >>> solver.weights, solver.finished
        (tensor([[0.7500]]), True)
    """

    def __init__(self, problem: Quadratic) -> None:
        """Refuses curvature that couples weights.

        Args:
            problem: The quadratic to minimise.

        Raises:
            ValueError: If a curvature couples weights.
        """
        if not problem.kind.elementwise:
            kind = problem.kind.kind
            raise ValueError(f"there is no closed form with {kind} curvature: it couples weights")
        super().__init__(problem)

    def _step(self) -> None:
        self.finished = True
        if issubclass(self.problem.kind, Identity):
            self._point = self._point_before
            return  # the average it is
        # In float64: what certain clients leave may be fainter than float32 can divide by.
        average = self.problem.average.double()
        total, pull = torch.zeros_like(average), torch.zeros_like(average)
        for p, weights, curvature in zip(
            self.problem.client_weights, self.problem.weights, self.problem.curvatures, strict=True
        ):
            exact = curvature.to(average.device, average.dtype)
            total += p * exact.apply(torch.ones_like(average))
            pull += p * exact.apply(average - weights)
        self.weights = self.weights - torch.where(total > 0, pull / total, 0.0).to(self.weights)


class ConjugateGradient(Solver):
    """Preconditioned conjugate gradients (Hestenes & Stiefel, 1952) to a relative residual.

    The preconditioner is the pseudo-inverse of the clients' mean curvature. For Kronecker factors
    it makes tens of steps enough where plain conjugate gradients take a thousand. Directions of
    either factor in which no client has curvature stay at the average. All steps are made in the
    preconditioner's eigenbasis, in which it is diagonal and few directions may be left. A solver
    that takes many steps writes the clients' factors there anew, once, so that a step changes no
    basis any more. The true residual, of the curvature as it was, decides on the end. If float32
    cannot reach the tolerance, the solver goes on in float64.

    Example:
        >>> from lightning_fedfisher.curvature import Dense
        >>> weights = [torch.zeros(1, 2), torch.ones(1, 2)]
        >>> curvature = Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), (1, 2))
        >>> solver = ConjugateGradient(Quadratic([1, 3], weights, [curvature, curvature]))
        >>> solver.advance(10)
        >>> solver.weights, solver.converged
        (tensor([[0.7500, 0.7500]]), True)
    """

    # Steps without progress after which none is to be expected.
    _PATIENCE = 100
    # Steps whose gains tell those to come.
    _WINDOW = 3
    # A true residual that agrees with the one carried along.
    _AGREES = 1.1

    def __init__(
        self,
        problem: Quadratic,
        tolerance: float = 1e-4,
        rcond: float = 1e-6,
        relative_gap: float = 0.0,
    ) -> None:
        """Starts at the average.

        Args:
            problem: The quadratic to minimise.
            tolerance: The `residual` at which it is finished.
            rcond: Part of the mean curvature's largest eigenvalue (for a Kronecker product, of
                either factor's) up to which a direction counts as one without curvature.
            relative_gap: It is finished as well once the objective is expected to be above its
                minimum by no more than this fraction.
        """
        super().__init__(problem)
        self._tolerance, self._rcond, self._relative_gap = tolerance, rcond, relative_gap
        self._gains: list[float] = []
        self._inverse: PseudoInverse | None = None
        self._moved: Tensor | None = None
        self._stalled = False
        self.finished = norm(problem.start.gradient) <= tolerance * self._scale
        if not self.finished:
            self._begin()

    @property
    @override
    def converged(self) -> bool:
        return self.finished and not self._stalled

    @override
    def advance(self, iterations: int) -> None:
        super().advance(iterations)
        self._settle()

    def _settle(self) -> None:
        """Brings `weights` up to the steps made since `_begin`."""
        if self._inverse is not None and self._moved is not None:
            self.weights = self._started_from + self._inverse.from_eigenbasis(self._moved)

    @override
    def _visible(self, gradient: Tensor) -> Tensor:
        # In the preconditioner's eigenbasis, which keeps the norm. Along directions without
        # curvature there is no gradient, but for rounding.
        if self._inverse is None:
            return gradient
        return self._inverse.support * self._inverse.to_eigenbasis(gradient)

    def _begin(self) -> None:
        """Starts, or starts anew, at the iterate."""
        if self._inverse is None:
            self._inverse = self.problem.mean_curvature.pseudo_inverse(self._rcond)
            self._matvec = MatvecWithin(self.problem, self._inverse)
        self._residual = -self._visible(self.point.gradient)
        self._started_from, self._moved = self.weights, None
        self._started_at = self._least = norm(self._residual)
        self._waited = 0
        self.finished = self._least <= self._AGREES * self._tolerance * self._scale
        self._direction = self._inverse.inverse * self._residual
        self._squared = self._energy = dot(self._residual, self._direction)

    @override
    def _step(self) -> None:
        assert self._inverse is not None
        direction = self._direction
        curved = self._matvec(direction)
        curvature_along = dot(direction, curved)
        # What it would be, were the preconditioner the inverse.
        if curvature_along <= _rounding(direction) * self._energy:
            self._check()  # the mean curvature sees this direction, and no client's does
            return
        step = self._squared / curvature_along
        moved = torch.zeros_like(direction) if self._moved is None else self._moved
        self._moved = moved.add_(direction, alpha=step)
        self._residual.sub_(curved, alpha=step)
        self._gains.append(step * self._squared)
        length = norm(self._residual)
        self._waited = 0 if length < self._least else self._waited + 1
        self._least = min(length, self._least)
        settled = self._has_settled()
        if length <= self._tolerance * self._scale or self._waited > self._PATIENCE or settled:
            self._check(length if settled else 0.0)
            return
        preconditioned = self._inverse.inverse * self._residual
        squared = dot(self._residual, preconditioned)
        turn = squared / self._squared
        self._direction = direction.mul_(turn).add_(preconditioned)
        # Directions are conjugate, and the residual orthogonal to those before.
        self._squared, self._energy = squared, squared + turn * turn * self._energy

    def _has_settled(self) -> bool:
        """Whether all further steps together will hardly lower the objective, as far as it seems.

        Gains fall geometrically, or faster. So those to come are no more than a geometric series
        that goes on as slowly as the last ones.
        """
        last = self._gains[-self._WINDOW :]
        if not self._relative_gap or len(last) < self._WINDOW:
            return False
        ratio = max(after / before for before, after in pairwise(last))
        objective = self.problem.start.objective - sum(self._gains)
        return ratio < 1 and last[-1] * ratio <= (1 - ratio) * self._relative_gap * objective

    def _check(self, settled_at: float = 0.0) -> None:
        """Compares with the true residual, and decides how to go on.

        The solver is finished, starts anew, goes on in float64, or has come as far as it can.

        Args:
            settled_at: The residual carried along, if the objective has settled there; else 0.
        """
        before = self._started_at
        self._settle()
        self._begin()
        # Rounding alone might have let it settle, and the true residual tells.
        self.finished = self.finished or self._started_at <= self._AGREES * settled_at
        if self.finished or self._started_at < before / 2:
            return
        if self.weights.dtype == torch.float64:
            self.finished = self._stalled = True
            return
        self.problem, self.weights = self.problem.in_double(), self.weights.double()
        self._inverse = self._point = self._moved = None
        self._begin()


def _rounding(tensor: Tensor) -> float:
    """The part of a sum of products that may be rounding."""
    return 100 * torch.finfo(tensor.dtype).eps


def exact_solver(problem: Quadratic, rcond: float = 1e-6, relative_gap: float = 0.0) -> Solver:
    """The solver that reaches the minimum: the closed form where there is one.

    Args:
        problem: The quadratic to minimise.
        rcond: As for `ConjugateGradient`.
        relative_gap: As for `ConjugateGradient`.

    Returns:
        A solver that starts at the average.
    """
    if problem.kind.elementwise:
        return ClosedForm(problem)
    return ConjugateGradient(problem, rcond=rcond, relative_gap=relative_gap)


class PublishedServer(Solver):
    """The server of FedFisher as its authors run it: Adam-like steps without bias correction.

    ``m = 0.9 m + g``, ``v = 0.99 v + g * g``, ``W -= 0.01 m / d``, with the damping 0.01 either
    inside the root (K-FAC) or added to it (diagonal). It never finishes by itself.

    Example:
        >>> from lightning_fedfisher.curvature import Identity
        >>> problem = Quadratic([1], [torch.ones(1, 1)], [Identity((1, 1))])
        >>> solver = PublishedServer(problem, damping_inside=True)
        >>> solver.advance(2000)
        >>> solver.iterations, solver.finished
        (2000, False)
    """

    def __init__(self, problem: Quadratic, *, damping_inside: bool) -> None:
        """Starts at the average.

        Args:
            problem: The quadratic to minimise.
            damping_inside: Whether ``d`` is ``sqrt(v + 0.01)`` rather than ``sqrt(v) + 0.01``.
        """
        super().__init__(problem)
        self._damping_inside = damping_inside
        self._mean = torch.zeros_like(self.weights)
        self._square = torch.zeros_like(self.weights)

    def _step(self) -> None:
        before = self._point_before
        gradient = self.problem.gradient(self.weights) if before is None else before.gradient
        self._mean = 0.9 * self._mean + gradient
        self._square = 0.99 * self._square + gradient.square()
        inside, outside = (0.01, 0.0) if self._damping_inside else (0.0, 0.01)
        scale = (self._square + inside).sqrt() + outside
        self.weights = self.weights - 0.01 * self._mean / scale
