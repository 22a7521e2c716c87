"""How much memory this process takes."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_memory(run: Callable[[], Any]) -> tuple[Any, float]:
    """Runs something and tells how much memory it took at most beyond what was there.

    Args:
        run: what to run.

    Returns:
        Its result, and bytes.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    # Five: the high-water mark starts anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    result = run()
    return result, status_bytes("VmHWM") - before


def status_bytes(field: str) -> float:
    """What the kernel says of this process's memory.

    Unlike `resource.getrusage`, which for a started process counts the memory of the one that
    started it.

    Args:
        field: ``VmRSS``, what is resident now, or ``VmHWM``, the most that was.

    Returns:
        Bytes.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * float(next(line for line in lines if line.startswith(field)).split()[1])
