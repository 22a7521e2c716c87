"""The merge of ``fedfisher merge`` on several devices, by a Lightning Trainer."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Trainer

from lightning_fedfisher.merge.result import MergeResult
from lightning_fedfisher.merge_module import FisherMergeModule


def merge_on_trainer(
    files: Sequence[str], accelerator: str, devices: int, options: Mapping[str, Any]
) -> MergeResult:
    """Merges update files with `FisherMergeModule`.

    Args:
        files: The update files, one for each client.
        accelerator: Lightning's name of the accelerator.
        devices: Number of devices, or of processes on a CPU.
        options: Keywords of `FisherMergeModule`.

    Returns:
        The result of the merge, on every rank.

    Raises:
        KeyboardInterrupt: If the merge was interrupted.
        ValueError: If Lightning refuses the devices.
    """
    with _quiet_lightning():
        trainer = _make_trainer(accelerator, devices)
        merge = FisherMergeModule(files, **options)
        try:
            trainer.fit(merge)
        except SystemExit:  # as Lightning ends an interrupted fit
            if trainer.interrupted:
                raise KeyboardInterrupt from None
            raise
        return merge.result


def check_devices(accelerator: str, devices: int) -> None:
    """Refuses devices that Lightning does not have here, before any update is read.

    Args:
        accelerator: Lightning's name of the accelerator.
        devices: Number of devices, or of processes on a CPU.

    Raises:
        ValueError: If Lightning refuses the devices.
    """
    with _quiet_lightning():
        _make_trainer(accelerator, devices)


def _make_trainer(accelerator: str, devices: int) -> Trainer:
    return Trainer(
        accelerator=accelerator,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=-1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
    )


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Mutes Lightning's advice, and turns its complaints about flags into a `ValueError`."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.filterwarnings("ignore", message=".*no `val_dataloader`")
        try:
            yield
        except MisconfigurationException as error:
            raise ValueError(str(error)) from error
        finally:
            logger.setLevel(level)
