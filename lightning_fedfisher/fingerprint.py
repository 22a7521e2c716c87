"""What tells one merge from another, so that a checkpoint is resumed by its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from torch import Tensor

from lightning_fedfisher.update import ClientUpdate
from lightning_fedfisher.update_file import digest


def fingerprint(method: str, updates: Sequence[ClientUpdate], averages: Iterable[Tensor]) -> str:
    """Tells one merge from another: the averages depend on every weight of every client.

    Args:
        method: name of the method.
        updates: of all clients, in order.
        averages: of each layer.

    Returns:
        In hexadecimal.
    """
    headers = [update.header for update in updates]
    parts = [
        method,
        str([(h.num_samples, h.curvature, h.fisher, h.likelihood, dict(h.kinds)) for h in headers]),
        *(digest(matrix.detach().cpu()) for matrix in averages),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
