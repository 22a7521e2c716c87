"""Times functions, on the CPU or on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def timed(
    run: Callable[[], Result], repeats: int, device: torch.device | None = None
) -> tuple[Result, float]:
    """Calls a function several times, and takes the shortest time.

    Args:
        run: the function.
        repeats: how often to call it, at least once.
        device: that does the work; each call ends when a GPU has finished. None means the CPU.

    Returns:
        The result of the last call, and the shortest time of a call in seconds.
    """
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = run()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return result, min(seconds)
