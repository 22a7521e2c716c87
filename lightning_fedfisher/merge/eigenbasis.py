"""Hessian-vector products in the eigenbasis of a preconditioner."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightning_fedfisher.curvature.linalg import PseudoInverse
from lightning_fedfisher.merge.disk_cache import OnDiskCurvatures
from lightning_fedfisher.merge.objective import LazyCurvatures, Quadratic, weighted_sum


def matvec_within(problem: Quadratic, inverse: PseudoInverse) -> Callable[[Tensor], Tensor]:
    """Prepares the Hessian-vector product on coordinates.

    Where the clients' curvature can be written in the eigenbasis, that is done once, and a product
    changes no basis. It takes the memory of the curvature again at most; what is not held in memory
    goes to disk.

    Args:
        problem: The quadratic.
        inverse: The pseudo-inverse of its mean curvature.

    Returns:
        The map ``X -> P sum_k p_k F_k P' X``, where ``P`` takes a weight matrix to coordinates.

    Example:
        >>> import torch
        >>> from lightning_fedfisher.curvature import Kronecker
        >>> curvature = Kronecker(torch.tensor([[2.0]]), torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
        >>> problem = Quadratic([1.0], [torch.zeros(1, 2)], [curvature])
        >>> product = matvec_within(problem, problem.mean_curvature.pseudo_inverse(1e-3))
        >>> product(torch.ones(1, 1))
        tensor([[6.]])
    """
    restrict = inverse.restrict
    if restrict is None or not problem.kind.restricts:
        return lambda coordinates: (
            inverse.support
            * inverse.to_eigenbasis(problem.matvec(inverse.from_eigenbasis(coordinates)))
        )
    restricted = map(restrict, problem.curvatures)
    if isinstance(problem.curvatures, LazyCurvatures):
        held = OnDiskCurvatures(restricted, problem.average.device)
        return lambda coordinates: weighted_sum(problem.client_weights, held, coordinates)
    here = list(restricted)
    return lambda coordinates: weighted_sum(problem.client_weights, here, coordinates)
