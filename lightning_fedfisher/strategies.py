"""Which Lightning strategies keep the whole model in every process, as curvature needs it."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)


def require_whole_model(trainer: Trainer, who: str) -> None:
    """Refuses strategies that shard the model, before any hour is spent.

    Args:
        trainer: the trainer about to start.
        who: what cannot run under them, for the message.

    Raises:
        ValueError: if the strategy shards weights over processes.
    """
    sharding: tuple[type[Strategy], ...] = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
    if isinstance(trainer.strategy, sharding):
        raise ValueError(
            f"{who} needs the whole model in every process, and {type(trainer.strategy).__name__} "
            'shards it: use strategy="ddp" or a single device'
        )
