"""Batches on their way to a module, as a Lightning Trainer sends them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden


def as_in_training(trainer: Trainer, module: LightningModule) -> Callable[[Any], Any]:
    """Gives what the Trainer does to a batch of its own loader before the module sees it.

    Args:
        trainer: The running Trainer.
        module: Its module.

    Returns:
        A function of a batch: the precision's type, the module's or data module's batch hooks, and
        the device.
    """

    def prepare(batch: Any) -> Any:
        batch = module._on_before_batch_transfer(_in_precision(trainer, batch))
        return trainer.strategy.batch_to_device(batch)

    return prepare


def without_hooks(trainer: Trainer, module: LightningModule) -> Callable[[Any], Any]:
    """Gives what it takes to run a module on batches of another loader than the Trainer's.

    Hooks that change training batches, as mixup does, have no part in it.

    Args:
        trainer: The running Trainer.
        module: Its module.

    Returns:
        A function of a batch: the precision's type and the device.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    transfer = "transfer_batch_to_device"
    owner = data if data is not None and is_overridden(transfer, data) else module
    move = partial(getattr(owner, transfer), device=trainer.strategy.root_device, dataloader_idx=0)
    return lambda batch: move(_in_precision(trainer, batch))


def _in_precision(trainer: Trainer, batch: Any) -> Any:
    return trainer.strategy.precision_plugin.convert_input(batch)
