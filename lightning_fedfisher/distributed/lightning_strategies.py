"""What Lightning strategies do for this package: keep the whole model, and add tensors up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_fedfisher.distributed.lightning_packages import is_lightnings

_T = TypeVar("_T")

_SHARDING = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


def require_whole_model(trainer: Trainer, who: str) -> None:
    """Refuses strategies that shard the model or lose the result, before training begins.

    Args:
        trainer: The trainer that is about to start.
        who: Name of the class that cannot run under such a strategy, for the message.

    Raises:
        ValueError: If the strategy shards weights over processes, or spawns or forks them.
    """
    if is_lightnings(trainer.strategy, *_SHARDING):
        raise ValueError(
            f"{who} needs the whole model in every process, and {type(trainer.strategy).__name__} "
            'shards it: use strategy="ddp" or a single device'
        )
    if is_lightnings(trainer.strategy.launcher, "_MultiProcessingLauncher"):
        raise ValueError(
            f"{who} leaves its result in the processes that made it, which spawned or forked ones "
            'take with them: use strategy="ddp" or a single device'
        )


def on_rank_zero(trainer: Trainer, work: Callable[[], _T]) -> _T:
    """Does something on rank 0 alone, and tells all processes what came of it.

    Args:
        trainer: The running trainer. Every process must call this.
        work: What to do there.

    Returns:
        What it returned, on every process.

    Raises:
        Exception: What it raised, on every process, so that none waits for rank 0 in vain.
    """
    done: tuple[_T | None, Exception | None] = None, None
    if trainer.is_global_zero:
        try:
            done = work(), None
        except Exception as error:
            done = None, error
    found, refused = trainer.strategy.broadcast(done)
    if refused is not None:
        raise refused
    return cast(_T, found)


def sum_over_ranks(trainer: Trainer, tensor: Tensor) -> Tensor:
    """Adds a tensor up over all processes of a trainer.

    Args:
        trainer: The running trainer. Every process must call this with a tensor of the same shape.
        tensor: A tensor on the trainer's device. The reduction may work in place.

    Returns:
        The sum, on every process.
    """
    total = trainer.strategy.reduce(tensor, reduce_op="sum")
    assert isinstance(total, Tensor)
    return total
