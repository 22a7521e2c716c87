"""Progress bars for what takes a while: on rank 0, and on a terminal only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

from lightning_fedfisher.distributed.processes import is_rank_zero

_T = TypeVar("_T")


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
    return tqdm(items, desc=title, total=total, delay=2, leave=False, disable=silent)
