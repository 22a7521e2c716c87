"""Which Lightning strategies keep the whole model in every process, as curvature needs it."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor


def require_whole_model(trainer: Trainer, who: str) -> None:
    """Refuses strategies that shard the model or lose the result, before any hour is spent.

    Args:
        trainer: the trainer about to start.
        who: what cannot run under them, for the message.

    Raises:
        ValueError: if the strategy shards weights over processes, or starts them by itself.
    """
    sharding: tuple[type[Strategy], ...] = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
    if isinstance(trainer.strategy, sharding):
        raise ValueError(
            f"{who} needs the whole model in every process, and {type(trainer.strategy).__name__} "
            'shards it: use strategy="ddp" or a single device'
        )
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(
            f"{who} leaves its result in the processes that made it, which spawned or forked ones "
            'take with them: use strategy="ddp" or a single device'
        )


def sum_over_ranks(trainer: Trainer, tensor: Tensor) -> Tensor:
    """Adds a tensor up over all processes of a trainer.

    Args:
        trainer: The running trainer.
        tensor: This process's tensor; a reduction may change it in place.

    Returns:
        The sum, on every process.
    """
    total = trainer.strategy.reduce(tensor, reduce_op="sum")
    assert isinstance(total, Tensor)
    return total
