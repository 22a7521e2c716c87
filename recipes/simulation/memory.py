"""Measures how much memory this process takes (Linux only), and how much of a GPU's."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_memory(run: Callable[[], Any]) -> tuple[Any, float]:
    """Calls a function and measures the most memory that it took.

    Args:
        run: the function.

    Returns:
        Its result, and the bytes beyond those that were resident before.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = reset_peak()
    result = run()
    return result, status_bytes("VmHWM") - before


def reset_peak() -> float:
    """Lets the kernel forget the most memory that this process ever took.

    Returns:
        The bytes that are resident now, from which ``VmHWM`` (`status_bytes`) grows again.
    """
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


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


def peak_device_memory(run: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """Calls a function and measures the most memory of a GPU that tensors took.

    Args:
        run: the function.
        device: that does the work.

    Returns:
        Its result, and the bytes with all that was there before; None if it is no GPU.
    """
    if device.type != "cuda":
        return run(), None
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    result = run()
    return result, torch.cuda.max_memory_allocated(device)
