"""The record of a merge, from the module that did it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from lightning_fedfisher._utils.environment import versions
from lightning_fedfisher._utils.text import client_names
from lightning_fedfisher.merge_module import FisherMergeModule
from lightning_fedfisher.results.record import ClientRecord, FederationRecord, MergeRecord


def describe_merge(merge: FisherMergeModule, seconds: float | None = None) -> MergeRecord:
    """Tells how a merge went.

    Args:
        merge: after its fit.
        seconds: that it took.

    Returns:
        All that the server knows by itself: no score, and no time of the clients.
    """
    sizes = [update.upload_bytes for update in merge.updates]
    return MergeRecord(
        merge.method,
        [dict(entry) for entry in merge.history],
        [layer.name for layer in merge.layers],
        merge.distances.tolist(),
        merge.influence.amax(2).tolist(),
        round(sum(sizes) / len(sizes)),
        merge.updates[0].fedavg_bytes,
        server_seconds=seconds,
        server_labels=merge.server_labels,
    )


def describe_federation(
    merge: FisherMergeModule, title: str, seconds: float, config: Mapping[str, Any]
) -> FederationRecord:
    """Tells all that a server knows of a federation after its merge.

    Args:
        merge: after its fit.
        title: what it is, in a few words.
        seconds: that the merge took.
        config: what it was asked for.

    Returns:
        Clients by name, with sizes and samples, and the merge.
    """
    names = client_names([update.source for update in merge.updates])
    clients = [
        ClientRecord(name, update.num_samples, upload_bytes=update.upload_bytes)
        for name, update in zip(names, merge.updates, strict=True)
    ]
    environment = {"date": f"{datetime.now(UTC):%Y-%m-%d}", **versions()}
    merges = [describe_merge(merge, seconds)]
    return FederationRecord(title, clients, merges, config=dict(config), environment=environment)
