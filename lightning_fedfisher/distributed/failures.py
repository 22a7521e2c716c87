"""What fails on one rank is told on all of them, where they would have waited for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, distributed


class RankError(RuntimeError):
    """Another rank failed, and this one can do nothing without it.

    Example:
        >>> str(RankError(1, "ValueError: no samples"))
        'rank 1 failed: ValueError: no samples'
    """

    def __init__(self, rank: int, reason: str) -> None:
        """Says which rank failed and why.

        Args:
            rank: The other rank.
            reason: What it raised, in words.
        """
        super().__init__(f"rank {rank} failed: {reason}")


def raise_together(error: Exception | None) -> None:
    """Raises what failed on any rank; every rank must call this.

    Args:
        error: What failed on this rank; None if nothing did.

    Raises:
        Exception: The error of this rank, if it has one.
        RankError: If another rank has one.

    Example:
        >>> raise_together(None)
    """
    told: list[str | None] = [None]
    if distributed.is_initialized():
        told *= distributed.get_world_size()
        own = None if error is None else f"{type(error).__name__}: {error}"
        distributed.all_gather_object(told, own)
    if error is not None:
        raise error
    for rank, reason in enumerate(told):
        if reason is not None:
            raise RankError(rank, reason)


@contextmanager
def shared_failures(total: Callable[[Tensor], Tensor]) -> Iterator[Callable[[Tensor], Tensor]]:
    """Has a block fail on all ranks where it fails on one; every rank must enter it.

    Args:
        total: Adds a tensor up over all ranks.

    Yields:
        The same, for the block to use as often on every rank: before it waits for the others, all
        tell whether they have failed.

    Raises:
        RankError: If another rank failed.
    """

    def guarded(tensor: Tensor) -> Tensor:
        raise_together(None)
        return total(tensor)

    try:
        yield guarded
    except RankError:  # who failed has told it
        raise
    except Exception as error:
        raise_together(error)
    raise_together(None)
