"""What a checkpoint of a merge holds, and whether it belongs to this merge."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_fedfisher.merge.layer_state import LayerState, Progress
from lightning_fedfisher.merge.merger import Merger
from lightning_fedfisher.merge.methods import MergeMethod
from lightning_fedfisher.update.client_update import ClientUpdate

# What a resumed merge may change, or a method of one's own cannot show.
_NOT_COMPARED = {"transform", "output_transform", "solver", "max_iterations", "keeps_best"}


def fingerprint(
    method: MergeMethod, updates: Sequence[ClientUpdate], keeps_means: bool = False
) -> str:
    """Tells one merge from another, alike in every process.

    Args:
        method: The merge method, told by its name and numbers.
        updates: The updates of all clients in their order, told by what is sent without the
            metadata; updates in memory are hashed.
        keeps_means: Whether running statistics are estimated (see `LayerLoader`).

    Returns:
        SHA-256 in hexadecimal.
    """
    fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    told = {name: value for name, value in fields.items() if name not in _NOT_COMPARED}
    clients = [
        [dataclasses.asdict(update.header) | {"metadata": {}}, dict(update.digests)]
        for update in updates
    ]
    text = json.dumps([told, clients, keeps_means], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def save_state(merger: Merger, fingerprint: str) -> dict[str, Any]:
    """What a checkpoint has to hold beside the merged matrices.

    Args:
        merger: The merge in work.
        fingerprint: Its `fingerprint`, computed once: it may hash all updates.

    Returns:
        Numbers, words and tensors, which load with ``weights_only=True``.
    """
    return {
        "fingerprint": fingerprint,
        "states": torch.stack([state.to_row() for state in merger.states]),
        "max_iterations": merger.method.max_iterations,
        "history": merger.history,
        "best": merger.best,
        "validation_samples": merger.validation_samples,
        "influence": merger.influence,
    }


def load_state(merger: Merger, saved: Mapping[str, Any], fingerprint: str) -> None:
    """Goes on where `save_state` left off; the merged matrices are restored elsewhere.

    Args:
        merger: A merge of the same updates by the same method.
        saved: What `save_state` returned.
        fingerprint: The `fingerprint` of this merge.

    Raises:
        ValueError: If it is of another merge.
    """
    width = LayerState.width(len(merger.updates))
    if saved.get("fingerprint") != fingerprint or saved["states"].shape[1] != width:
        raise ValueError(
            "the checkpoint is of another merge, or of another version: resume it with the same "
            "updates, in the same order, the same method, and a statistics loader if it had one"
        )
    merger.states = [LayerState.from_row(row) for row in saved["states"].cpu()]
    merger.history, merger.influence = list(saved["history"]), saved["influence"].cpu()
    if saved["max_iterations"] != merger.method.max_iterations:
        # A layer that ran out of iterations begins anew, with all that wait for it.
        stopped = [state.progress is Progress.STOPPED for state in merger.states]
        waiting = LayerState.waiting(len(merger.updates))
        merger.states = [
            waiting if any(stopped[i] for i in merger.loader.alignments.ancestors(index)) else state
            for index, state in enumerate(merger.states)
        ]
    merger.unread = {index for index, state in enumerate(merger.states) if state.waits}
    merger.best, merger.validation_samples = saved["best"], saved["validation_samples"]
