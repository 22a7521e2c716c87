"""Sums of second moments, computed in products that are large enough to be fast."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Size of a Gram matrix from which it is worth computing its upper blocks only: below, one product
# is faster than several smaller ones that save less than half of its work.
_MIN_SYMMETRIC_SIZE = 128
# Gram matrices are computed in strips of a quarter of their rows, which saves three eighths of the
# work. Strips of fewer than 80 rows make products too small to be fast; with more than 512 rows,
# more strips save more and cost nothing.
_STRIPS, _MIN_STRIP, _MAX_STRIP = 4, 80, 512
# Vectors that a product takes: with fewer, reading and writing the matrix takes longer than the
# product; with more, float32 rounds what is added to a sum that is large already.
_FEWEST, _MOST = 512, 4096


class GramSum:
    """The second moment of features, summed over samples and positions.

    Vectors wait until there are as many as features, or 512. So each product is a large one, and
    what waits takes little more memory than the sum, which is not there before it is needed.

    Example:
        >>> gram = GramSum(2, like=torch.ones(()))
        >>> gram.add(torch.tensor([[[1.0], [2.0]]]), scale=3.0)
        >>> gram.total()
        tensor([[ 3.,  6.],
                [ 6., 12.]])
    """

    def __init__(self, features: int, like: Tensor) -> None:
        """Starts at zero.

        Args:
            features: Number of features.
            like: A tensor that gives the dtype and device of the sum.
        """
        self._features, self._like = features, like.new_empty(())
        self._enough = max(features, _FEWEST)
        self._waiting: list[Tensor] = []
        self._count = 0
        self._total: Tensor | None = None

    def total(self) -> Tensor:
        """Gives the sum so far, a matrix of shape ``(features, features)``."""
        self._flush()
        return self._sum

    def add(self, features: Tensor, scale: float) -> None:
        """Adds the second moment of features.

        Args:
            features: A tensor of shape ``(samples, features, positions)``.
            scale: Factor that it is multiplied by.
        """
        size = features.shape[1]
        if features.mT.is_contiguous():
            flat = features.mT.reshape(-1, size).mT
        else:
            flat = features.transpose(0, 1).reshape(size, -1)
        if flat.shape[1] >= self._enough:
            for some in torch.split(flat, _MOST, dim=1):
                add_product(self._sum, some, scale)
            return
        self._waiting.append(flat * math.sqrt(scale))
        self._count += flat.shape[1]
        if self._count >= self._enough:
            self._flush()

    @property
    def _sum(self) -> Tensor:
        """The sum without what waits."""
        if self._total is None:
            self._total = self._like.new_zeros(self._features, self._features)
        return self._total

    def _flush(self) -> None:
        """Adds what waits."""
        if self._waiting:
            vectors = torch.cat(self._waiting, dim=1)
            self._waiting, self._count = [], 0
            add_product(self._sum, vectors, 1.0)


def add_product(total: Tensor, vectors: Tensor, scale: float) -> None:
    """Adds the sum of the outer products of vectors with themselves.

    Args:
        total: Symmetric matrix of shape ``(features, features)`` that it is added to, in place.
        vectors: A tensor of shape ``(features, count)``.
        scale: Factor that it is multiplied by.
    """
    size, count = vectors.shape
    if size < _MIN_SYMMETRIC_SIZE or count < min(size, _FEWEST):
        total.addmm_(vectors, vectors.mT, alpha=scale)
        return
    # The matrix is symmetric: what is right of a strip's diagonal block tells what is below it.
    rows = max(_MIN_STRIP, min(_MAX_STRIP, size // _STRIPS))
    for start in range(0, size, rows):
        strip = slice(start, start + rows)
        upper = scale * (vectors[strip] @ vectors[start:].mT)
        total[strip, start:] += upper
        total[start + rows :, strip] += upper[:, rows:].mT
