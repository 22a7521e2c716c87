"""Measures how much memory this process takes (Linux only)."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_memory(run: Callable[[], Any]) -> tuple[Any, float]:
    """Calls a function and measures the most memory that it took.

    Args:
        run: the function.

    Returns:
        Its result, and the bytes beyond those that were resident before.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    # Writing 5 resets the peak that the kernel keeps (VmHWM).
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    result = run()
    return result, status_bytes("VmHWM") - before


def status_bytes(field: str) -> float:
    """Reads what the kernel reports of this process's memory.

    (`resource.getrusage` would count the memory of the process that started this one as well.)

    Args:
        field: ``VmRSS`` for what is resident now, ``VmHWM`` for the most that was.

    Returns:
        The number of bytes.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * float(next(line for line in lines if line.startswith(field)).split()[1])
