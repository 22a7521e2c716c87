"""What becomes of buffers such as BatchNorm's statistics: they have no curvature."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_fedfisher.merge.influence_cap import cap_values
from lightning_fedfisher.merge.objective import average
from lightning_fedfisher.update.buffer_roles import variance_partner
from lightning_fedfisher.update.client_update import ClientUpdate


def merge_buffers(
    updates: Sequence[ClientUpdate],
    max_influence: float = math.inf,
    buffers: Sequence[Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Merges buffers: BatchNorm's variances by the law of total variance, others by their average.

    Whole numbers (counters, indices) become their median, the lower one of an even number: what
    most clients agree on, if they do, and nothing that one client alone decides. Of two clients,
    neither of whom can be judged by others, they become the larger.
    Buffers that hold infinite values, as masks do, become the median as well.

    Args:
        updates: The updates of all clients, found to belong together.
        max_influence: What a client's number of samples, and the distance of each of its values
            from the median, may be, as a multiple of the median client's.
        buffers: What some of each client's buffers are taken to be; their own if None.

    Returns:
        The merged buffers by name.
    """
    samples = [float(update.num_samples) for update in updates]
    capped = partial(cap_values, samples, max_influence=max_influence)
    carried: Sequence[Mapping[str, Tensor]] = buffers or [{}] * len(updates)

    def of_clients(name: str) -> Iterator[Tensor]:
        """Reads one buffer of all clients: all buffers of all clients may not fit into memory."""
        for own, update in zip(carried, updates, strict=True):
            yield own[name] if name in own else update.buffer(name)

    names, merged = updates[0].buffer_names, dict[str, Tensor]()
    for name in names:
        location = variance_partner(name)
        # A mask or a table of constants may be too large to hold that of each client.
        if location is None and (agreed := _agreed(of_clients(name))) is not None:
            merged[name] = agreed
            continue
        values = [*of_clients(name)]
        first = values[0]
        finite = first.is_floating_point() and all(value.isfinite().all() for value in values)
        if not finite:  # counters, or a mask: they have no average
            merged[name] = _middle(values)
            continue
        # In float64, where no difference of two numbers overflows.
        found = average(*capped([value.double() for value in values]))
        if location is not None and location in names:
            weights, means = capped([value.double() for value in of_clients(location)])
            center = average(weights, means)
            spread = average(weights, [(mean - center).square() for mean in means])
            found = found.clamp_min(0) + spread
        limits = torch.finfo(first.dtype)
        merged[name] = found.clamp(limits.min, limits.max).to(first.dtype)
    return merged


def describe_mixed_statistics(
    updates: Sequence[ClientUpdate], carried: Collection[str] = ()
) -> str:
    """Tells that the merged model normalises by statistics of other weights than its own.

    Args:
        updates: The updates of all clients, found to belong together.
        carried: Names of those buffers that are carried over to the merged weights.

    Returns:
        What to do about it; empty if all clients have the same running statistics, or none.
    """
    every = [name for name in updates[0].specs if variance_partner(name) is not None]
    names = [name for name in every if name not in carried]
    if not names:
        return ""
    first, *others = updates
    unlike = [
        name
        for name, value in ((name, first.buffer(name)) for name in names)
        if any(not torch.equal(value, other.buffer(name)) for other in others)
    ]
    if not unlike:
        return ""
    more = f" and {len(unlike) - 1} more" if len(unlike) > 1 else ""
    return (
        f"running statistics are merged from clients that differ ({unlike[0]}{more}), and are not "
        "those of the merged weights, which can cost most of the accuracy: pass statistics_loader= "
        "to merge_updates or FisherMergeModule, a few hundred samples without labels, or let "
        "clients train with BatchNorm in eval mode"
    )


def _middle(values: Sequence[Tensor]) -> Tensor:
    """The lower median of each entry; of two whole numbers, who cannot be judged, the larger."""
    two_counts = len(values) == 2 and not values[0].is_floating_point()
    return torch.stack(list(values)).sort(dim=0).values[1 if two_counts else (len(values) - 1) // 2]


def _agreed(values: Iterator[Tensor]) -> Tensor | None:
    """Finds out what all clients agree on, two of them in memory at a time; None if they do not."""
    first = next(values)
    return first if all(torch.equal(first, other) for other in values) else None
