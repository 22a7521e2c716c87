"""Matrices of low rank: a root of few rows, from which everything else follows faster.

A second moment of a few hundred samples has no more rank than that, however many rows it has.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PROBES = 8  # vectors that show what a root leaves: it escapes all of them once in 10^9 times
_BLOCK = 64  # rows of a root that are found together
_STRIP = 128  # rows that are converted to float64 at a time
_ROUNDING = 64 * torch.finfo(torch.float64).eps  # of sums of a few hundred products
_FLATTEST = 1e-3  # eigenvalue of a block, as a multiple of its largest, that may be divided by


def pivoted_root(matrix: Tensor, most: int) -> tuple[Tensor, float]:
    """Computes a root by pivoted Cholesky decomposition, in blocks, down to the rounding.

    The rows that the root explains least come next (Harbrecht, Peters & Schneider, 2012, "On the
    low-rank approximation by the pivoted Cholesky decomposition"), relative to their own diagonal
    entry, which rounding is relative to as well. What a root of a semi-definite matrix leaves of
    the diagonal is not negative: where it is, that is how large rounding is.

    Args:
        matrix: A symmetric matrix ``M`` of shape ``(n, n)`` whose diagonal is positive.
        most: Rows of the root after which it gives up.

    Returns:
        A root ``U``, of shape ``(rank, n)`` in float64 with ``U' U = M`` but for rounding, and what
        it leaves: the estimated norm of ``M - U' U`` as a fraction of the trace. That is large if
        the rank is larger than ``most``, or if the matrix is not positive semi-definite.

    Example:
        >>> root, left = pivoted_root(torch.full((3, 3), 4.0), most=2)
        >>> root.round(decimals=6), left < 1e-12
        (tensor([[2., 2., 2.]], dtype=torch.float64), True)
    """
    scale = matrix.diagonal().double().sqrt()
    left, root, rank = torch.ones_like(scale), scale.new_empty(most, len(scale)), 0
    while rank < most:
        rounding = max(4 * torch.finfo(matrix.dtype).eps, _ROUNDING, -2 * float(left.min()))
        block = left.argsort(descending=True, stable=True)[: min(_BLOCK, most - rank)]
        block = block[left[block] > rounding]
        if not len(block):
            break
        above = root[:rank]
        rows = matrix[block].double().div_(scale).div_(scale[block].unsqueeze(1))
        rows.addmm_(above[:, block].mT, above, alpha=-1)
        values, vectors = torch.linalg.eigh(rows[:, block])
        kept = values > max(rounding, _FLATTEST * float(values[-1]))
        if not kept.any():
            break
        found = (vectors[:, kept] / values[kept].sqrt()).mT @ rows
        root[rank : rank + len(found)] = found
        rank += len(found)
        left -= found.square().sum(0)
    root = root[:rank]
    # The same noise everywhere, and no state of a generator is touched.
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(len(scale), _PROBES, generator=generator, dtype=torch.float64)
    probes, root = probes.to(scale.device), root.mul_(scale)
    # Strip by strip, since a copy in float64 would take as long as all the rest.
    whole = torch.cat([strip.double() @ probes for strip in torch.split(matrix, _STRIP)])
    norm = float((whole - root.mT @ (root @ probes)).square().mean(1).sum().sqrt())
    return root, norm / float(scale.square().sum())
