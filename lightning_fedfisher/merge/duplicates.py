"""Updates that are there twice: a client under several names would count as several."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_fedfisher._utils.text import terminal_lines
from lightning_fedfisher.distributed.processes import warn_on_rank_zero
from lightning_fedfisher.update.client_update import ClientUpdate


def without_duplicates(updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
    """Leaves out the updates that are copies of earlier ones, with a warning that names them all.

    Args:
        updates: The updates of all clients.

    Returns:
        The first of each digest, in the order given.

    Example:
        >>> without_duplicates([])
        []
    """
    first: dict[str, ClientUpdate] = {}
    copies = []
    for update in updates:
        digest = update.digest
        if digest in first:
            copies.append(f"{update.source} is a copy of {first[digest].source}")
        first.setdefault(digest, update)
    if copies:
        counted = "an update that is there twice counts once, unless allow_duplicates=True:"
        warn_on_rank_zero(terminal_lines("\n".join([counted, *copies])))
    return list(first.values())
