"""What is told of a federation that started from a pre-trained network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_fedfisher.results.record import (
    ClientRecord,
    FederationRecord,
    MergeRecord,
    ModelScore,
)
from simulation.clients import ClientResult, assess, ensemble
from simulation.environment import environment
from simulation.pretrained_setting import Flags, Task
from simulation.results import Report


def describe(
    task: Task,
    flags: Flags,
    histogram: np.ndarray,
    merges: Sequence[MergeRecord],
    results: Sequence[ClientResult],
    predictions: Sequence[Tensor],
    labels: Tensor,
    device: torch.device,
) -> tuple[Report, FederationRecord]:
    """Gathers what ``results.json`` and the report tell.

    Args:
        task: data and network.
        flags: of the command line.
        histogram: number of samples of each client and class.
        merges: what there is to tell of each merge, in the order of the methods.
        results: of each fine-tuned client; empty if none was.
        predictions: log-probabilities of each of them on the test set.
        labels: of the test set.
        device: that did the work.

    Returns:
        The content of ``results.json``, and the record that the page is made of.
    """
    scores = [assess(predicted, labels) for predicted in predictions]
    # Clients that only fit a head have no model of their own to test.
    best = max(scores, key=lambda one: one.accuracy, default=None)
    together = assess(ensemble(predictions), labels) if predictions else None
    config = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(flags).items()}
    config |= {"dataset": task.name, "model": task.network, "methods": list(flags.methods)}
    config["options"] = dict(task.options)
    about = environment(device)
    clients = [
        ClientRecord(
            f"client-{index}",
            int(counts.sum()),
            counts.tolist(),
            results[index].train_loss if results else [],
            score=scores[index] if scores else None,
        )
        for index, counts in enumerate(histogram)
    ]
    title = f"{task.name}, {task.network}, {flags.clients} clients, alpha {flags.alpha:g}"
    record = FederationRecord(title, clients, merges, best, together, config, about)
    methods = {
        one.method: {
            **_numbers(one.score),
            "upload_bytes": one.upload_bytes,
            "fedavg_bytes": one.fedavg_bytes,
            "client_seconds": one.client_seconds or 0.0,
            "server_seconds": one.server_seconds,
            "server_labels": one.server_labels,
        }
        for one in merges
    }
    return {
        "config": config,
        "data": task.note,
        "environment": about,
        "clients": [
            {"num_samples": int(counts.sum()), "accuracy": scores[k].accuracy if scores else None}
            for k, counts in enumerate(histogram)
        ],
        "best_client": _numbers(best),
        "ensemble": _numbers(together),
        "methods": methods,
    }, record


def _numbers(score: ModelScore | None) -> dict[str, Any]:
    """The scores of a model, without its confusion matrix; empty without a model."""
    if score is None:
        return {}
    return {name: value for name, value in asdict(score).items() if name != "confusion"}
