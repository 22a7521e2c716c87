"""Robust averages of weights: what Byzantine-robust learning would make of the same updates.

They read weights and buffers alone, as flat vectors, one for each client, and are told how many
clients may be hostile.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mean(vectors: Tensor, hostile: int) -> Tensor:
    """Averages all clients, whatever they sent.

    Args:
        vectors: a row for each client, of shape ``(clients, n)``.
        hostile: how many of them may be hostile.

    Returns:
        A vector of shape ``(n,)``.
    """
    return vectors.mean(0)


def coordinate_median(vectors: Tensor, hostile: int) -> Tensor:
    """Takes the median of each coordinate (Yin et al., 2018).

    Args:
        vectors: a row for each client, of shape ``(clients, n)``.
        hostile: how many of them may be hostile.

    Returns:
        A vector of shape ``(n,)``.
    """
    return vectors.quantile(0.5, dim=0)


def trimmed_mean(vectors: Tensor, hostile: int) -> Tensor:
    """Averages each coordinate without the largest and the smallest (Yin et al., 2018).

    Args:
        vectors: a row for each client, of shape ``(clients, n)``.
        hostile: how many of them may be hostile: as many are left out at either end.

    Returns:
        A vector of shape ``(n,)``.
    """
    return vectors.sort(dim=0).values[hostile : len(vectors) - hostile].mean(0)


def krum(vectors: Tensor, hostile: int) -> Tensor:
    """Takes the client whose nearest others are nearest (Blanchard et al., 2017).

    Args:
        vectors: a row for each client, of shape ``(clients, n)``.
        hostile: how many of them may be hostile: all but those and two count as near.

    Returns:
        A vector of shape ``(n,)``.
    """
    squares = torch.cdist(vectors.double(), vectors.double()).square()
    nearest = squares.sort(dim=1).values[:, 1 : len(vectors) - hostile - 1]
    return vectors[int(nearest.sum(1).argmin())]
