"""How many bytes an update's file may take, and what is said if that is too little."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lightning_fedfisher.errors import BudgetError

# Any upload budget allows so many bytes: below, the names of the layers are most of a file.
_SMALLEST_BUDGET = 2**14

# What a file may unpack to: a matrix of any narrow layer, and a multiple of its bytes that allows
# for the columns of a layer of one row, 4096 of them at a budget of 1.
_UNPACKED_ANYWAY, _UNPACKED_TIMES = 2**25, 2**12
_FLOAT_BYTES = 4  # of a number, whatever it is packed as


def unpacked_excess(shapes: Iterable[tuple[int, ...]], file_bytes: int) -> str:
    """Finds out whether what is packed in a file takes memory out of all proportion to it.

    A root of one row is as many numbers as its matrix has rows, so that a few bytes could stand for
    gigabytes.

    Args:
        shapes: Shapes of the tensors that are packed, before they were.
        file_bytes: Size of the file.

    Returns:
        The reason to refuse it; empty if there is none.

    Example:
        >>> unpacked_excess([(10_000, 10_000)], file_bytes=2**14)
        'it unpacks to 400000000 bytes, and 16384 may unpack to 100663296'
    """
    unpacked = _FLOAT_BYTES * sum(map(math.prod, shapes))
    most = _UNPACKED_ANYWAY + _UNPACKED_TIMES * file_bytes
    if unpacked <= most:
        return ""
    return f"it unpacks to {unpacked} bytes, and {file_bytes} may unpack to {most}"


def budget_bytes(upload_budget: float, fedavg_bytes: int) -> int:
    """Counts the bytes that a file may take.

    Args:
        upload_budget: Largest size of the file, as a multiple of what a FedAvg client would send.
        fedavg_bytes: What a FedAvg client would send.

    Returns:
        The most bytes, at least 16 KiB.

    Raises:
        ValueError: If the budget is not greater than zero.

    Example:
        >>> budget_bytes(0.5, fedavg_bytes=1_000_000)
        500000
    """
    if not 0 < upload_budget < math.inf:
        raise ValueError(f"upload_budget must be greater than 0, got {upload_budget}")
    return max(int(upload_budget * fedavg_bytes), _SMALLEST_BUDGET)


def budget_error(source: str, upload_budget: float, size: int, reason: object) -> BudgetError:
    """Makes the error of a budget that is too small.

    Args:
        source: What messages call the update.
        upload_budget: The budget.
        size: Bytes that it allows.
        reason: Why they are too few.
    """
    return BudgetError(
        f"{source} does not fit into upload_budget={upload_budget:g}, {size} bytes: {reason}. "
        "Raise it, send a smaller kind of curvature, or pass None"
    )
