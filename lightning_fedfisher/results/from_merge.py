"""The record of a merge, from its result."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from lightning_fedfisher._utils.environment import versions
from lightning_fedfisher.merge.result import MergeResult
from lightning_fedfisher.results.record import ClientRecord, FederationRecord, MergeRecord


def describe_merge(result: MergeResult, seconds: float | None = None) -> MergeRecord:
    """Records how a merge went.

    Args:
        result: The result of the merge.
        seconds: Wall-clock time that it took; the result's own if None.

    Returns:
        All that the server knows by itself: no score, and no time of the clients.
    """
    sizes = [client.upload_bytes for client in result.clients]
    return MergeRecord(
        result.method,
        [dict(entry) for entry in result.history],
        [layer.name for layer in result.layers],
        result.distances.tolist(),
        result.influence.amax(2).tolist(),
        round(sum(sizes) / len(sizes)),
        result.fedavg_bytes,
        server_seconds=result.seconds if seconds is None else seconds,
        server_labels=result.server_labels,
        unlabelled_samples=result.unlabelled_samples,
        similarity=result.similarity,
    )


def describe_federation(
    result: MergeResult, title: str, config: Mapping[str, Any]
) -> FederationRecord:
    """Records all that a server knows of a federation after its merge.

    Args:
        result: The result of the merge.
        title: A few words on what it is.
        config: What the merge was asked for.

    Returns:
        The clients by name, with sizes and samples, and the merge.
    """
    clients = [
        ClientRecord(client.name, client.num_samples, upload_bytes=client.upload_bytes)
        for client in result.clients
    ]
    environment = {"date": f"{datetime.now(UTC):%Y-%m-%d}", **versions()}
    merges = [describe_merge(result)]
    return FederationRecord(title, clients, merges, config=dict(config), environment=environment)
