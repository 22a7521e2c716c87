"""Progress bars for what takes a while: on rank 0, and on a terminal only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

from lightning_fedfisher.distributed.processes import Shard, is_rank_zero

_T = TypeVar("_T")
_DELAY_SECONDS = 2  # what is over sooner shows no bar


def progress_bar(items: Iterable[_T], title: str, total: int | None = None) -> tqdm[_T]:
    """Goes through items with a progress bar that appears after two seconds.

    Args:
        items: Anything that is slow to go through.
        title: A few words on what is done.
        total: Number of items, where they cannot tell it themselves.

    Returns:
        The bar, which yields the items.
    """
    # None: shown on a terminal only.
    silent = None if is_rank_zero() else True
    return tqdm(items, desc=title, total=total, delay=_DELAY_SECONDS, leave=False, disable=silent)


def samples_bar(title: str, shard: Shard, shown: bool) -> tqdm[Any]:
    """Makes a progress bar for a pass over samples that appears after two seconds.

    Args:
        title: A few words on what is done.
        shard: The place of this process; the bar counts the samples of all of them.
        shown: Whether to show it, on rank 0 and on a terminal only.

    Returns:
        The bar, to be told how many samples are done.
    """
    return tqdm(
        desc=title,
        unit=" samples",
        unit_scale=shard.world_size,
        delay=_DELAY_SECONDS,
        disable=None if shown and shard.rank == 0 else True,
    )
