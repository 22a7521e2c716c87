"""Describes a finished round as a `FederationRecord`, for the report and for W&B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from lightning_fedfisher import ClientUpdate
from lightning_fedfisher.curvature.summary import summarize_curvature
from lightning_fedfisher.results.record import ClientRecord, FederationRecord, MergeRecord
from simulation.clients import ClientResult
from simulation.round import Merged, Round
from simulation.scores import assess, ensemble


def record_round(
    current: Round,
    clients: Sequence[ClientResult],
    predictions: Sequence[Tensor],
    merged: Mapping[str, Merged],
    headline: str,
    environment: Mapping[str, str],
) -> FederationRecord:
    """Gathers all that there is to report of a round.

    Args:
        current: the round.
        clients: the result of each client.
        predictions: log-probabilities ``(n, classes)`` of each client's model on the test set.
        merged: the merged model of each method.
        headline: the method whose model is kept.
        environment: date, versions and hardware.

    Returns:
        The record, with the headline first among its merges.
    """
    flags, labels = current.flags, current.images.test.labels
    scores = [assess(predicted, labels) for predicted in predictions]
    own = []
    for index, (folder, client) in enumerate(zip(current.folders, clients, strict=True)):
        path = folder.update(headline)
        update = ClientUpdate.open(path)
        own.append(
            ClientRecord(
                f"client-{index}",
                client.num_samples,
                current.histogram[index].tolist(),
                client.train_loss,
                client.extraction_seconds[path.name],
                update.upload_bytes,
                [summarize_curvature(layer.name, update.block(layer)) for layer in update.layers],
                scores[index],
            )
        )
    order = sorted(merged, key=lambda method: method != headline)
    title = f"{flags.dataset}, {flags.model}, {flags.clients} clients, alpha {flags.alpha:g}"
    if current.number > 1:
        title += f", round {current.number}"
    return FederationRecord(
        title,
        own,
        [_merge(current, clients, method, merged) for method in order],
        max(scores, key=lambda score: score.accuracy),
        assess(ensemble(predictions), labels),
        current.flags.plain(),
        dict(environment),
    )


def _merge(
    current: Round, clients: Sequence[ClientResult], method: str, merged: Mapping[str, Merged]
) -> MergeRecord:
    """The record of one merge, with what only a simulation knows: test scores and client times."""
    file = current.folders[0].update(method).name
    seconds = [client.extraction_seconds[file] for client in clients]
    return replace(
        merged[method].result.record,
        client_seconds=sum(seconds) / len(seconds),
        score=merged[method].score,
    )
