"""Limits that a user gives as a number, as "auto", or not at all."""

from __future__ import annotations

from numbers import Integral
from typing import Literal

Limit = int | Literal["auto"] | None
"""Most of something to take: a number, "auto" (a fraction, but not too few), or None (all)."""


def check_limit(name: str, limit: object) -> None:
    """Refuses a value that is not a `Limit`.

    Args:
        name: What the user calls it.
        limit: Value that the user gave.

    Raises:
        ValueError: If it is neither a whole number from 1, ``"auto"`` nor None.
    """
    counted = isinstance(limit, Integral) and not isinstance(limit, bool) and int(limit) >= 1
    if not counted and limit not in (None, "auto"):
        raise ValueError(f"{name} must be at least 1, None or 'auto', got {limit!r}")


def at_most(limit: Limit, available: int, fraction: int, fewest: int) -> int:
    """Tells how many are taken of those available.

    Args:
        limit: The limit.
        available: How many there are.
        fraction: ``"auto"`` takes one of so many.
        fewest: ``"auto"`` takes so many at least.

    Returns:
        A number, at most those available.

    Example:
        >>> [at_most(limit, 100, fraction=16, fewest=4) for limit in ("auto", 50, None)]
        [6, 50, 100]
    """
    if limit == "auto":
        limit = max(fewest, available // fraction)
    return available if limit is None else min(limit, available)
