"""Several processes in one: ranks that are threads, of which one runs at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from lightning_fedfisher.distributed.processes import Shard

_T = TypeVar("_T")


def run_ranks(world_size: int, work: Callable[[Shard], _T]) -> list[_T]:
    """Runs all ranks at once, each with its shard, and returns what each found."""
    barrier, passed = threading.Barrier(world_size, timeout=60), [torch.empty(0)] * world_size
    turn = threading.Lock()  # one at a time, as processes share no state

    def meet() -> None:
        turn.release()
        try:
            barrier.wait()
        finally:
            turn.acquire()

    def run(rank: int) -> _T:
        def total(tensor: Tensor) -> Tensor:
            passed[rank] = tensor
            meet()
            result = torch.stack(passed).sum(0)
            meet()
            return result

        with turn:
            try:
                return work(Shard(rank, world_size, total))
            except BaseException:
                barrier.abort()
                raise

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))
