"""Hessian-vector products in the eigenbasis of a preconditioner."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.curvature.linalg import PseudoInverse
from lightning_fedfisher.merge.disk_cache import OnDiskCurvatures
from lightning_fedfisher.merge.objective import LazyCurvatures, Quadratic, weighted_sum


class MatvecWithin:
    """The Hessian-vector product on coordinates: ``X -> P sum_k p_k F_k P' X``.

    ``P`` takes a weight matrix to coordinates. At first each product changes the basis. A solver
    that goes on makes it worth while to write the clients' curvature in the eigenbasis, where the
    kind allows it. That takes the memory of the curvature again at most; what is not held in memory
    goes to disk.

    Example:
        >>> import torch
        >>> from lightning_fedfisher.curvature import Kronecker
        >>> curvature = Kronecker(torch.tensor([[2.0]]), torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
        >>> problem = Quadratic([1.0], [torch.zeros(1, 2)], [curvature])
        >>> product = MatvecWithin(problem, problem.mean_curvature.pseudo_inverse(1e-3))
        >>> product(torch.ones(1, 1))
        tensor([[6.]])
    """

    def __init__(self, problem: Quadratic, inverse: PseudoInverse) -> None:
        """Reads no curvature.

        Args:
            problem: The quadratic.
            inverse: The pseudo-inverse of its mean curvature.
        """
        self._problem, self._inverse = problem, inverse
        self._products = 0
        self._written: Sequence[Curvature] | None = None

    def __call__(self, coordinates: Tensor) -> Tensor:
        """Multiplies coordinates.

        Args:
            coordinates: ``X``.

        Returns:
            A tensor of the same shape.
        """
        problem, inverse = self._problem, self._inverse
        if self._pays():
            self._written = self._write()
        self._products += 1
        if self._written is not None:
            return weighted_sum(problem.client_weights, self._written, coordinates)
        product = problem.matvec(inverse.from_eigenbasis(coordinates))
        return inverse.support * inverse.to_eigenbasis(product)

    def _pays(self) -> bool:
        """Whether products have cost as much more by now as it takes to write the curvature.

        As nobody knows how many follow, that never costs more than twice the best.
        """
        found = self._inverse.restriction
        if found is None or self._written is not None or not self._problem.kind.restricts:
            return False
        clients = len(self._problem.weights)
        saved = clients * found.saved + found.changing
        return self._products * saved >= clients * found.writing

    def _write(self) -> Sequence[Curvature]:
        """Writes the clients' curvature in the eigenbasis."""
        assert self._inverse.restriction is not None
        written = map(self._inverse.restriction.write, self._problem.curvatures)
        if isinstance(self._problem.curvatures, LazyCurvatures):
            return OnDiskCurvatures(written, self._problem.average.device)
        return list(written)
