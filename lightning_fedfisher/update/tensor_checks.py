"""Whether a tensor can be what it is said to be: nobody's curvature is taken at their word."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_fedfisher.curvature.powers import TensorRole

StoredRole = TensorRole | Literal["weights", "mean"]
"""What a tensor of an update is: a part of a curvature, weights, or a running mean."""

LARGEST_VALUE = 1e18
"""Largest absolute value of curvature: what float32 can still multiply."""

LARGEST_WEIGHT = 1e9
"""Largest absolute value of weights: layers of such are multiplied when units are aligned."""

_LARGEST: dict[StoredRole | None, float] = {
    "weights": LARGEST_WEIGHT,
    "basis": 2.0,  # of orthonormal columns no entry is above 1, but for rounding
    None: torch.finfo(torch.float32).max,
}

_ROUNDING = 1e-4  # of the trace, or of the largest entry; more where the type is coarser
_ROUNDED = 4.0  # times that rounding may change the square of a length
_MAX_ELEMENTS, _MAX_DIMENSIONS = 2**48, 16


def find_problem(tensor: Tensor, role: StoredRole | None, definite: bool = True) -> str:
    """Finds out why a tensor cannot be used.

    Args:
        tensor: A tensor of any type and shape.
        role: What it must be. None if nothing is known of it.
        definite: Whether to make sure that a factor is symmetric and positive semi-definite.

    Returns:
        The reason to refuse it; empty if there is none.

    Example:
        >>> find_problem(torch.tensor([1.0, -1.0]), "values")
        'holds negative values, down to -1.0e+00'
        >>> find_problem(torch.tensor([1.0, -1.0]), "weights")
        ''
    """
    if not tensor.is_floating_point():
        return ""
    if not tensor.numel():
        return ""
    lowest, highest = map(float, tensor.aminmax())  # in one pass; not a number if any is not
    largest, rounding = max(-lowest, highest), max(_ROUNDING, torch.finfo(tensor.dtype).eps)
    if not math.isfinite(largest):
        return f"holds {int((~torch.isfinite(tensor)).sum())} values that are not finite"
    if largest > (limit := value_limit(role, tensor.dtype)):
        return f"holds values up to {largest:.1e}, more than {limit:.2g}"
    if role == "values" and lowest < -rounding * largest:
        return f"holds negative values, down to {lowest:.1e}"
    if role == "basis" and not _are_of_unit_length(tensor):
        return "is no orthonormal basis"
    if role == "factor" and definite:
        if float((tensor - tensor.mT).abs().max()) > rounding * largest:
            return "is not symmetric"
        # The ridge is far above float32's rounding, which takes half the time.
        exact = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        if not is_semidefinite(exact, rounding):
            return "is not positive semi-definite"
    return ""


def _are_of_unit_length(columns: Tensor) -> bool:
    """Tells whether columns are of length 1 up to coarse rounding, or nothing at all."""
    squares = columns.float().square().sum(dim=0)
    odd = (squares < 1 / _ROUNDED) | (squares > _ROUNDED)
    return not (odd & columns.any(dim=0)).any()


def value_limit(role: StoredRole | None, dtype: torch.dtype) -> float:
    """Says how large the values of a tensor may be.

    Args:
        role: What the tensor is. None if nothing is known of it.
        dtype: Its floating-point type.

    Returns:
        The largest absolute value: what the type holds, and what float32 can multiply as often as
        a merge does. What nothing is known of may be as large as float32 holds.

    Example:
        >>> value_limit("factor", torch.float32)
        1e+18
    """
    most = _LARGEST.get(role, LARGEST_VALUE)
    return min(torch.finfo(dtype).max, most)


def largest_of(tensor: Tensor) -> float:
    """Finds the largest absolute value of a tensor.

    Args:
        tensor: A tensor of any type and shape.

    Returns:
        The value; 0 if there is none.

    Example:
        >>> largest_of(torch.tensor([1.0, -2.0]))
        2.0
    """
    if not tensor.numel():
        return 0.0
    lowest, highest = map(float, tensor.aminmax())
    return max(-lowest, highest)


def is_semidefinite(matrix: Tensor, rounding: float) -> bool:
    """Tells whether a symmetric matrix has no negative eigenvalue beyond rounding.

    Args:
        matrix: A square matrix in float32 or float64.
        rounding: Multiple of the trace by which an eigenvalue may be below zero.

    Returns:
        False if an eigenvalue is further below.

    Example:
        >>> is_semidefinite(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), rounding=1e-4)
        False
    """
    if not matrix.any():
        return True
    ridge = rounding * matrix.trace()
    _, failed = torch.linalg.cholesky_ex(matrix + ridge * torch.eye(len(matrix)).to(matrix))
    return not failed


def is_possible(shape: Sequence[int]) -> bool:
    """Tells whether a tensor of a shape can exist.

    Args:
        shape: Sizes, from a stranger.

    Returns:
        False if it has too many dimensions or elements, even if some size is zero.

    Example:
        >>> is_possible([2, 3]), is_possible([0, 2**60])
        (True, False)
    """
    return (
        len(shape) <= _MAX_DIMENSIONS and math.prod(max(size, 1) for size in shape) <= _MAX_ELEMENTS
    )
