"""How many bytes an update's file may take, and what is said if that is too little."""

from __future__ import annotations

import math

from lightning_fedfisher.errors import BudgetError
from lightning_fedfisher.update.compression import fewest_bytes
from lightning_fedfisher.update.header import UpdateHeader
from lightning_fedfisher.update.unpacked_size import unpacked_excess

# Any upload budget allows so many bytes: below, the names of the layers are most of a file.
_SMALLEST_BUDGET = 2**14


def shortage(header: UpdateHeader, rest: int, file_bytes: int) -> str:
    """Finds out whether an update can be packed into a file at all.

    Args:
        header: Header of the update.
        rest: Bytes of what is not packed.
        file_bytes: Size of the file.

    Returns:
        Why it cannot; empty if it may.
    """
    least = rest + fewest_bytes(header)
    if file_bytes < least:
        return f"at least {least} bytes are needed"
    packed = (name for name in header.tensor_roles() if not name.startswith("input_means/"))
    return unpacked_excess(header, packed, file_bytes)


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
