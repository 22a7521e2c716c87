"""Describes a federation that started from a pre-trained network, for results and report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_fedfisher.results.record import (
    ClientRecord,
    FederationRecord,
    MergeRecord,
)
from simulation.clients import ClientResult
from simulation.environment import environment
from simulation.pretrained_setting import Flags, Task
from simulation.scores import assess, ensemble


def record_federation(
    task: Task,
    flags: Flags,
    histogram: np.ndarray,
    merges: Sequence[MergeRecord],
    results: Sequence[ClientResult],
    predictions: Sequence[Tensor],
    device: torch.device,
) -> FederationRecord:
    """Gathers all that there is to report.

    Args:
        task: data and network.
        flags: of the command line.
        histogram: number of samples of each client and class.
        merges: what there is to tell of each merge, in the order of the methods.
        results: of each fine-tuned client; empty if none was.
        predictions: log-probabilities of each of them on the test set.
        device: that did the work.

    Returns:
        The record.
    """
    labels = task.test.tensors[1]
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
    return FederationRecord(title, clients, list(merges), best, together, config, about)
