"""Roots of curvature: what is sent of a second-moment matrix, and how the matrix comes back.

Of a matrix ``M`` some ``U`` with ``U' U = M`` is sent, of shape ``(rank, n)``, so that it is stored
once and comes back positive semi-definite whatever the rounding. Any rotation of the rows of ``U``
will do. Where the rank is high it is the upper triangle, which has the fewest entries. Where it is
low a triangle saves little, and rows along the eigenvectors take fewer bits each.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lightning_fedfisher.curvature.low_rank import pivoted_root
from lightning_fedfisher.curvature.powers import power_of_root

# Least squared diagonal entry of a Cholesky root, as a multiple of the matrix's, by which a type is
# exact enough: float32 moves the root by a millionth then, and float64 by no more than the rounding
# of a matrix that is stored in float32.
_LEAST_PIVOT = {torch.float32: 1e-2, torch.float64: 1e-5}
_INDEFINITE = 1e-4  # multiple of the trace that a root may leave of a matrix
_SMALL = 2048  # rows up to which all eigenvalues take no longer than some
_PRODUCTS = 5  # by which leading eigenvectors are found
_NOTHING = 1e-6  # eigenvalue, as a multiple of the largest, that float32 finds in a singular matrix
_NARROW = 2  # times the rank: rows from which a root has no triangle
_STRIP = 256  # rows of a matrix that are restored together


def root_entries(rows: int, rank: int) -> int:
    """Counts the numbers that a root is sent as.

    Args:
        rows: Rows of the matrix.
        rank: Rows of the root, no more than those of the matrix.

    Returns:
        The number.

    Example:
        >>> root_entries(rows=8, rank=8), root_entries(rows=8, rank=2)
        (36, 16)
    """
    return rank * rows - (rank * (rank - 1) // 2 if _is_triangle(rows, rank) else 0)


def flatten_root(root: Tensor) -> Tensor:
    """Lists the numbers that a root is sent as, row by row, since entries of a row are alike.

    Args:
        root: A root of shape ``(rank, n)``, as `factor_root` returns it.

    Returns:
        The numbers in one dimension.
    """
    rank, rows = root.shape
    if not _is_triangle(rows, rank):
        return root.flatten()
    found = np.concatenate([row[first:] for first, row in enumerate(root.numpy())])
    return torch.from_numpy(found)


def unflatten_root(entries: Tensor, rows: int, rank: int) -> Tensor:
    """Undoes `flatten_root`.

    Args:
        entries: As many numbers as `root_entries` counts.
        rows: Rows of the matrix.
        rank: Rows of the root.

    Returns:
        The root, of shape ``(rank, rows)``.
    """
    if not _is_triangle(rows, rank):
        return entries.view(rank, rows)
    root, flat, start = np.zeros((rank, rows), entries.numpy().dtype), entries.numpy(), 0
    for first in range(rank):
        root[first, first:] = flat[start : start + rows - first]
        start += rows - first
    return torch.from_numpy(root)


def matrix_of_root(root: Tensor, tail: float = 0.0, power: float = 1.0) -> Tensor:
    """Multiplies a root with itself.

    Args:
        root: A root ``U`` of shape ``(rank, n)``.
        tail: What is added to the diagonal, where the root is not all zero.
        power: Power that the matrix is raised to; greater than zero.

    Returns:
        ``(U' U + tail)^power``, symmetric and of shape ``(n, n)``.
    """
    if power != 1:
        return power_of_root(root, power, tail)
    rank, rows = root.shape
    matrix = root.new_empty(rows, rows)
    for start in range(0, rows, _STRIP):
        stop = min(start + _STRIP, rows)
        some = root[:stop] if _is_triangle(rows, rank) else root  # below, a triangle is zero
        strip = some[:, start:stop].mT @ some[:, :stop]
        strip[:, start:] = (strip[:, start:] + strip[:, start:].mT) / 2  # but for rounding, equal
        matrix[start:stop, :stop], matrix[:stop, start:stop] = strip, strip.mT
    if tail:  # what no row sees is not in the tail either: it is zero
        matrix.diagonal().add_(tail * root.any(dim=0).to(matrix))
    return matrix


def factor_root(matrix: Tensor, most: int) -> tuple[Tensor, float]:
    """Computes a root of a second-moment matrix of any rank.

    What is zero, as for inputs that always are, stays zero. Directions that the matrix holds up to
    rounding alone are left out.

    Args:
        matrix: A symmetric matrix of shape ``(n, n)``.
        most: Most rows of the root. If they are fewer than the rank, they are those of the largest
            eigenvalues.

    Returns:
        The root, of shape ``(rank, n)`` and in at least float32, and the mean of the eigenvalues
        that it leaves out.

    Raises:
        ValueError: If it is not positive semi-definite up to rounding.
    """
    dead = matrix.diagonal() <= 0
    if matrix[dead].any() and float(matrix[dead].abs().max()) > _vanished(float(matrix.max())):
        raise ValueError("is not positive semi-definite")
    seen = (~dead).nonzero().squeeze(1)
    some = matrix if len(seen) == len(matrix) else matrix[seen][:, seen]
    narrow = most < len(seen)
    found, tail = _leading_root(some, most) if narrow else (_whole_root(some), 0.0)
    root = found.to(torch.promote_types(matrix.dtype, torch.float32))
    if len(seen) < len(matrix):
        root = root.new_zeros(len(root), len(matrix)).index_copy_(1, seen, root)
    if _is_triangle(len(matrix), len(root)):
        root = root if _is_upper(root) else torch.linalg.qr(root, mode="r").R
    elif not narrow:
        _, vectors = torch.linalg.eigh(root @ root.mT)
        root = vectors.mT @ root
    return root, tail


def _vanished(largest: float) -> float:
    """The largest product of an entry whose square is zero in float32, by one of the others."""
    return math.sqrt(max(largest, 0.0) * torch.finfo(torch.float32).tiny)


def _is_triangle(rows: int, rank: int) -> bool:
    """Tells whether a root is sent without the corner below its diagonal."""
    return rank * _NARROW > rows


def _is_upper(root: Tensor) -> bool:
    """Tells whether a root is zero below its diagonal."""
    return not root[:, : len(root)].tril(-1).any()


def _whole_root(matrix: Tensor) -> Tensor:
    """Computes a root of as many rows as the matrix has rank, up to rounding.

    Raises:
        ValueError: If it is not positive semi-definite up to rounding.
    """
    exact = torch.promote_types(matrix.dtype, torch.float32)
    half = len(matrix) // 2  # an eighth of the work, and shows most of what is singular
    _, pivot = _cholesky(matrix[:half, :half].to(exact))
    for dtype in dict.fromkeys((exact, torch.float64)):
        if pivot >= _LEAST_PIVOT[dtype]:
            root, pivot = _cholesky(matrix.to(dtype))
            if pivot >= _LEAST_PIVOT[dtype]:
                return root
    root, left = pivoted_root(matrix, len(matrix))
    if left > _INDEFINITE:
        raise ValueError("is not positive semi-definite")
    return root


def _cholesky(matrix: Tensor) -> tuple[Tensor, float]:
    """Computes the upper Cholesky root, and its least pivot: zero if there is no root."""
    lower, failed = torch.linalg.cholesky_ex(matrix)
    pivots = lower.diagonal().square() / matrix.diagonal()
    return lower.mT, float(pivots.min()) if len(matrix) and not failed else float(not failed)


def _leading_root(matrix: Tensor, rank: int) -> tuple[Tensor, float]:
    """Computes a root of the largest eigenvalues' part, and the mean of the others."""
    exact = matrix.float()  # leading directions are not lost in its rounding
    if len(matrix) <= _SMALL:
        values, vectors = torch.linalg.eigh(exact)
    else:
        values, vectors = _leading_eigenvectors(exact, rank)
    kept = slice(max(len(values) - rank, int((values <= _NOTHING * values[-1]).sum())), None)
    values, vectors = values[kept], vectors[:, kept]
    rest = float(matrix.diagonal().double().sum() - values.double().sum())
    tail = max(rest / (len(matrix) - len(values)), 0.0)
    return (vectors * (values - tail).clamp_min(0).sqrt()).mT, tail


def _leading_eigenvectors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Finds the largest eigenvalues, in ascending order, and their eigenvectors, about.

    By subspace iteration (Halko, Martinsson & Tropp, 2011, "Finding structure with randomness",
    algorithm 4.4).
    """
    start = torch.randn(len(matrix), rank, generator=torch.Generator().manual_seed(0))
    basis = start.to(matrix.dtype)
    for _ in range(_PRODUCTS):
        basis = torch.linalg.qr(matrix @ basis).Q
    values, vectors = torch.linalg.eigh(basis.mT @ (matrix @ basis))
    return values, basis @ vectors
