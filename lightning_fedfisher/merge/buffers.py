"""What becomes of the buffers: they have no curvature, and are no part of the quadratic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_fedfisher.merge.influence_cap import hold_values
from lightning_fedfisher.merge.objective import average
from lightning_fedfisher.update.client_update import ClientUpdate


def merge_buffers(
    updates: Sequence[ClientUpdate], max_influence: float = math.inf
) -> dict[str, Tensor]:
    """Counters by maximum, running variances by the law of total variance, the rest by average.

    Args:
        updates: of all clients, found to belong together.
        max_influence: what a client's number of samples, and the distance of its values from the
            median, may be, as a multiple of the median client's.

    Returns:
        The merged buffers by name.
    """
    samples = [float(update.num_samples) for update in updates]
    clients = [update.buffers for update in updates]
    hold = partial(hold_values, samples, most=max_influence)
    merged: dict[str, Tensor] = {}
    for name, first in clients[0].items():
        values = [buffers[name] for buffers in clients]
        location = name.removesuffix("running_var") + "running_mean"
        if not first.is_floating_point():
            ordered = torch.stack(values).sort(dim=0).values
            usual = ordered[(len(values) - 1) // 2]
            # Where most agree, as on an index, nobody else decides.
            agreed = 2 * (ordered == usual).sum(dim=0) > len(values)
            merged[name] = torch.where(agreed, usual, ordered[-1])
            continue
        # In float64, where no difference of two numbers overflows.
        found = average(*hold([value.double() for value in values]))
        if name.endswith("running_var") and location in clients[0]:
            shares, means = hold([buffers[location].double() for buffers in clients])
            pooled = average(shares, means)
            spread = average(shares, [(mean - pooled).square() for mean in means])
            found = found.clamp_min(0) + spread
        limits = torch.finfo(first.dtype)
        merged[name] = found.clamp(limits.min, limits.max).to(first.dtype)
    return merged
