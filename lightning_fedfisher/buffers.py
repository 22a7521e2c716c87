"""What becomes of the buffers: they have no curvature, and are no part of the quadratic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fedfisher.quadratic import average
from lightning_fedfisher.update import ClientUpdate


def merge_buffers(updates: Sequence[ClientUpdate]) -> dict[str, Tensor]:
    """Counters by maximum, running variances by the law of total variance, the rest by average.

    Args:
        updates: of all clients, found to belong together.

    Returns:
        The merged buffers by name.
    """
    shares = [update.num_samples for update in updates]
    clients = [update.buffers for update in updates]
    merged: dict[str, Tensor] = {}
    for name, first in clients[0].items():
        values = [buffers[name] for buffers in clients]
        location = name.removesuffix("running_var") + "running_mean"
        if not first.is_floating_point():
            merged[name] = torch.stack(values).amax(0)
        elif name.endswith("running_var") and location in clients[0]:
            means = [buffers[location] for buffers in clients]
            pooled = average(shares, means)
            spread = average(shares, [(mean - pooled).square() for mean in means])
            merged[name] = average(shares, values) + spread
        else:
            merged[name] = average(shares, values)
    return merged
