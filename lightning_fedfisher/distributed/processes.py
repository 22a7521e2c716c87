"""Which of several processes this one is, and how their tensors are added up."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor

# Where launchers tell a process its rank, in the order in which Lightning looks.
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def is_rank_zero() -> bool:
    """Tells whether this is the process of rank 0, or the only one.

    Example:
        >>> is_rank_zero()
        True
    """
    return process_rank() == 0


def process_rank() -> int:
    """Tells the rank of this process, 0 if it is the only one.

    Lightning sets the rank when it is imported. Before, the launcher's environment tells it.
    """
    rank = getattr(rank_zero_only, "rank", None)
    if rank is None:
        rank = next((os.environ[name] for name in _RANKS if name in os.environ), 0)
    return int(rank)


def warn_on_rank_zero(message: str) -> None:
    """Warns on rank 0 alone, also where Lightning was never imported.

    Args:
        message: The warning.
    """
    if is_rank_zero():
        warnings.warn(message, stacklevel=3)


@dataclass(frozen=True)
class Shard:
    """The place of this process among those that extract curvature together.

    Attributes:
        rank: Index of this process, from 0.
        world_size: Number of processes.
        total: Function that adds a tensor up over all processes, and gives the sum to each of
            them. It may work in place.

    Example:
        >>> Shard().first(torch.ones(2))
        tensor([1., 1.])
    """

    rank: int = 0
    world_size: int = 1
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def first(self, tensor: Tensor) -> Tensor:
        """Gives every process the tensor of rank 0.

        Args:
            tensor: A tensor of the same shape on every process.

        Returns:
            The tensor of rank 0, bit for bit.
        """
        if self.world_size == 1:
            return tensor
        # A sum of one term and zeros is exact.
        return self.total(tensor.clone() if self.rank == 0 else torch.zeros_like(tensor))
