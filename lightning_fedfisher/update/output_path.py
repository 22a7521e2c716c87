"""Where a client's update is written if nobody named a file: not over another client's."""

from __future__ import annotations

import warnings
from itertools import count
from pathlib import Path

from lightning_fedfisher._utils.text import terminal_text
from lightning_fedfisher.errors import UpdateError
from lightning_fedfisher.update.client_update import ClientUpdate


def path_beside_others(path: Path, update: ClientUpdate) -> Path:
    """Finds a file for an update that no other update is in, and warns if it is not the first.

    Nothing in an update says whose it is. So it takes the place of an equal one alone, as that of a
    client that ran again from the same seed; any other may be of another client.

    Args:
        path: The file to write, if there is none or the same update is in it.
        update: The update to be written.

    Returns:
        The path, or ``NAME-2.safetensors`` beside it, ``NAME-3.safetensors`` and so on.

    Example:
        >>> path_beside_others(Path("nowhere/update.safetensors"), None).name
        'update.safetensors'
    """
    if not path.exists():
        return path
    digest = update.digest
    for number in count(1):
        own = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        if not own.exists() or _digest(own) == digest:
            break
    if own != path:
        told = (
            f"{path} holds another update, perhaps another client's, and is left as it is: this "
            f"one is written to {own}. Give each client its own FedFisherCallback(output=...), or "
            "delete the old file"
        )
        warnings.warn(terminal_text(told), stacklevel=2)
    return own


def _digest(path: Path) -> str | None:
    try:
        return ClientUpdate.open(path).digest
    except (OSError, UpdateError):  # no update, but somebody's
        return None
