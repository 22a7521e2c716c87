"""Progress bars of the server: on the first process, on a terminal, where it takes a while."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from lightning_utilities.core.rank_zero import rank_zero_only
from tqdm import tqdm

_T = TypeVar("_T")


def is_rank_zero() -> bool:
    """Whether this is the first process, or the only one."""
    return getattr(rank_zero_only, "rank", 0) == 0


def progress_bar(items: Iterable[_T], title: str, total: int | None = None) -> tqdm[_T]:
    """Goes through items with a bar that appears after two seconds.

    Args:
        items: anything that is slow to go through.
        title: what is done.
        total: how many there are, where they cannot tell.

    Returns:
        The items.
    """
    # None: shown on a terminal only.
    silent = None if is_rank_zero() else True
    return tqdm(items, desc=title, total=total, delay=2, leave=False, disable=silent)
