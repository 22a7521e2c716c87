"""Powers of symmetric positive semi-definite matrices, whole or given by a root."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_fedfisher.curvature.linalg import (
    coupled_rows,
    eigh,
    symmetric_eigendecomposition,
    takes_float32,
)
from lightning_fedfisher.curvature.low_rank import pivoted_root

TensorRole = Literal["factor", "values", "basis"]
"""What a tensor of a curvature is: a positive semi-definite matrix, eigenvalues, or a basis."""

# Up to so many rows, float64 costs little more.
_SMALL = 1024
# Leading eigenpairs that are looked for, passes in float32 and float64, and how exact they must be.
_LEADING, _ROUGH_PASSES, _PASSES, _CONVERGED = 32, 12, 4, 1e-10
# Rows from which a matrix may be worth a root of at most such a part of them, and what that may
# leave.
_WIDE, _NARROW, _LEFT = 512, 0.6, 1e-6


def require_positive_exponent(exponent: float) -> None:
    """Refuses powers that are not greater than zero.

    Args:
        exponent: The power.

    Raises:
        ValueError: If it is zero, negative or not a number.
    """
    if not exponent > 0:
        raise ValueError(f"the power of a curvature must be greater than 0, got {exponent}")


def tensor_power(tensor: Tensor, role: TensorRole, exponent: float, damping: float = 0.0) -> Tensor:
    """Computes what a tensor of a curvature is when the operator is raised to a power.

    Args:
        tensor: A tensor of a curvature.
        role: What it is.
        exponent: The power, greater than zero.
        damping: Part of its mean diagonal entry by which a factor is damped before.

    Returns:
        The power of a factor or of eigenvalues. A basis stays as it is, and so does all at power 1
        without damping.
    """
    tail = damping_of(tensor.diagonal(), damping) if role == "factor" else 0.0
    if exponent == 1 and not tail:
        return tensor
    if role == "factor":
        return symmetric_power(tensor, exponent, tail)
    return tensor.clamp_min(0).pow(exponent) if role == "values" else tensor


def symmetric_power(matrix: Tensor, exponent: float, tail: float = 0.0) -> Tensor:
    """Raises a symmetric positive semi-definite matrix to a positive power.

    Large matrices of float32 are decomposed in float32 (see `symmetric_eigendecomposition`).

    Args:
        matrix: A tensor of shape ``(n, n)``.
        exponent: The power; 0.5 gives the square root.
        tail: What is added to the diagonal first, where it is not zero.

    Returns:
        A tensor of the same shape.

    Example:
        >>> symmetric_power(torch.tensor([[4.0, 0.0], [0.0, 9.0]]), 0.5)
        tensor([[2., 0.],
                [0., 3.]])
    """
    coupled = coupled_rows(matrix)
    if not coupled.all():
        some = coupled.nonzero().squeeze(1)
        alone = matrix.diagonal().double().clamp_min(0)
        power = (alone + tail * (alone > 0)).pow(exponent).to(matrix.dtype).diag()
        power[some.unsqueeze(1), some] = symmetric_power(matrix[some][:, some], exponent, tail)
        return power
    if (root := _narrow_root(matrix)) is not None:
        return power_of_root(root.to(matrix.dtype), exponent, tail)
    if tail:
        matrix = matrix + tail * torch.eye(len(matrix)).to(matrix)
    if len(matrix) <= _SMALL or not takes_float32(matrix):
        return _power(*symmetric_eigendecomposition(matrix.double()), exponent).to(matrix.dtype)
    # Rounding goes by the largest eigenvalues, and its root by the root of them. So these few are
    # taken out before, which leaves the small ones their digits.
    exact = matrix.double()
    leading, vectors = _leading_eigenpairs(exact)
    rest = (exact - (vectors * leading) @ vectors.mT).to(matrix.dtype)
    values, others = symmetric_eigendecomposition(rest, exact=False)
    others = others - vectors.to(others) @ (vectors.to(others).mT @ others)
    power = _power(leading, vectors, exponent).to(matrix.dtype)
    return power + _power(values, others, exponent)


def power_of_root(root: Tensor, exponent: float, tail: float = 0.0) -> Tensor:
    """Raises a matrix that is given by a root to a positive power.

    All that is decomposed has as many rows as the root. Small eigenvalues keep more digits than the
    matrix itself has for them: rounding goes by the largest singular value, not by its square.

    Args:
        root: A root ``U`` of shape ``(rank, n)``, with no more rows than columns.
        exponent: The power.
        tail: What the matrix has on its diagonal beside ``U' U``, where the root is not all zero.

    Returns:
        ``(U' U + tail)^exponent``, of shape ``(n, n)``.

    Example:
        >>> power_of_root(torch.tensor([[0.0, 2.0, 0.0]]), 0.5)
        tensor([[0., 0., 0.],
                [0., 2., 0.],
                [0., 0., 0.]])
    """
    largest = float(root.abs().max()) if root.numel() else 0.0
    if not largest:
        return root.new_zeros(root.shape[1], root.shape[1])
    scale = max(largest, math.sqrt(tail))  # by which no square overflows, nor all of them vanish
    root, tail = root / scale, (math.sqrt(tail) / scale) ** 2
    _, vectors = eigh(root @ root.mT, exact=False)
    # The rows along U's left singular vectors tell singular values better than they were found.
    rows = vectors.to(root).mT @ root
    squares = rows.square().sum(1, keepdim=True)
    gain = ((squares + tail).pow(exponent) - tail**exponent).clamp_min(0)  # but for rounding
    half = rows * torch.where(squares > 0, gain / squares, 0.0).sqrt()
    power = half.mT @ half
    if tail:
        power.diagonal().add_(tail**exponent * root.any(dim=0).to(power))
    return power.mul_(scale ** (2 * exponent))


def damping_of(diagonal: Tensor, damping: float) -> float:
    """Computes the tail that damps a matrix.

    Args:
        diagonal: The matrix's diagonal.
        damping: A fraction of its mean entry, over those that are not zero.

    Returns:
        What to add to the diagonal where it is not zero.

    Example:
        >>> damping_of(torch.tensor([0.0, 2.0, 4.0]), damping=0.5)
        1.5
    """
    seen = diagonal[diagonal > 0]
    return damping * float(seen.double().mean()) if damping and len(seen) else 0.0


def _narrow_root(matrix: Tensor) -> Tensor | None:
    """Finds a root of few rows in float64; None if it takes too many to pay."""
    most = int(_NARROW * len(matrix))
    if len(matrix) < _WIDE or not (matrix.diagonal() > 0).all():
        return None
    root, left = pivoted_root(matrix, most)
    return root if len(root) < most and left <= _LEFT else None


def _power(values: Tensor, vectors: Tensor, exponent: float) -> Tensor:
    """Multiplies out the power of a matrix that is written by eigenpairs."""
    half = vectors * values.pow(exponent / 2)
    return half @ half.mT


def _leading_eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Finds a few of the largest eigenvalues, by subspace iteration, and none that is inexact."""
    seeds = torch.arange(1, _LEADING * len(matrix) + 1).to(matrix).view(-1, _LEADING)
    basis = torch.linalg.qr((seeds.square() * 0.7).cos()).Q
    for dtype, passes in ((torch.float32, _ROUGH_PASSES), (matrix.dtype, _PASSES)):
        rounded, basis = matrix.to(dtype), basis.to(dtype)
        for _ in range(passes):
            basis = torch.linalg.qr(rounded @ basis).Q
    product = matrix @ basis
    values, turn = torch.linalg.eigh(basis.mT @ product)
    vectors = basis @ turn
    error = torch.linalg.vector_norm(product @ turn - vectors * values, dim=0)
    exact = (error <= _CONVERGED * values[-1]) & (values > 0)
    return values[exact], vectors[:, exact]
