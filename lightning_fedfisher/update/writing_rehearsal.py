"""Writes an update for a trial, before the training that makes the real one."""

from __future__ import annotations

import uuid
from pathlib import Path

from lightning_fedfisher.update.client_update import ClientUpdate


def rehearse_writing(update: ClientUpdate, path: Path) -> None:
    """Writes an update next to where it will be, reads it as a server does, and removes it.

    Args:
        update: An update of the form that will be written.
        path: The file that will be written; it is not touched. Missing folders are made.

    Raises:
        OSError: If the file cannot be written.
        UpdateError: If it cannot be read.
    """
    trial = path.with_name(f".{uuid.uuid4().hex}.{path.name}")
    try:
        update.save(trial)
        # Whether the curvature is positive semi-definite takes long, and is so by its making.
        ClientUpdate.open(trial).verify(definite=False)
    finally:
        if trial.parent.is_dir():
            trial.unlink(missing_ok=True)
