"""The whole work of the server in one function: client updates become one model."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lightning_fedfisher.distributed.assignment import assign_layers
from lightning_fedfisher.distributed.progress import progress_bar
from lightning_fedfisher.merge.compatibility import UpdateSource
from lightning_fedfisher.merge.memory_budget import DEFAULT_MEMORY_BUDGET
from lightning_fedfisher.merge.merger import Merger
from lightning_fedfisher.merge.methods import MergeMethod
from lightning_fedfisher.merge.options import MergeOptions
from lightning_fedfisher.merge.result import MergeResult
from lightning_fedfisher.merge.validation import validate


def merge_updates(
    updates: Sequence[UpdateSource],
    *,
    method: str | MergeMethod = "fedfisher",
    model: nn.Module | None = None,
    validation_loader: Iterable[Any] | None = None,
    statistics_loader: Iterable[Any] | None = None,
    keep_best: bool | None = None,
    max_iterations: int | None = None,
    max_influence: float | None = None,
    skip_invalid: bool = False,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    allow_duplicates: bool = False,
    device: torch.device | str = "cpu",
) -> MergeResult:
    """Merges client updates into one model.

    An update is a quadratic around the client's weights, from the curvature of its loss there, and
    the merged model minimises their sum. `FisherMergeModule` does the same on a Trainer.

    Args:
        updates: Update files or `ClientUpdate` objects, one for each client.
        method: Name of the merge method, a key of `METHODS`, or a row of your own.
        model: A model to check the updates against, to validate with and to estimate statistics
            with. It is not changed; load the result with
            ``model.load_state_dict(result.state_dict, strict=False)``.
        validation_loader: Batches ``(x, y)`` on which the model is scored, one pass an epoch.
        statistics_loader: Batches of inputs, labels or not, on which the running statistics of the
            merged model's BatchNorm layers are estimated; None merges those of the clients. A few
            hundred samples of all clients' kind are enough.
        keep_best: Whether to return the iterate that scores best; the method's own choice if None.
        max_iterations: Solver steps to make for a layer at most.
        max_influence: What a client may weigh, as a multiple of the median client.
        skip_invalid: Whether to leave out the updates that would be refused, with a warning.
        memory_budget: Bytes of clients' weights and curvature to hold at a time.
        allow_duplicates: Whether an update that is there twice, to the digest, counts twice. It
            counts once otherwise, with a warning.
        device: Where to compute.

    Returns:
        The merged state dict, with how each layer and each client fared.

    Raises:
        MergeError: If updates cannot be merged by the method; all are named.
        ValueError: If an option is out of range or the model does not fit.

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_fedfisher.extraction import extract_curvature
        >>> from lightning_fedfisher.update import ClientUpdate
        >>> updates = []
        >>> for client in range(2):
        ...     model = nn.Linear(3, 2)
        ...     data = TensorDataset(torch.rand(8, 3), torch.arange(8) % 2)
        ...     extracted = extract_curvature(model, DataLoader(data), "kfac", progress=False)
        ...     update = ClientUpdate.from_model(model, extracted.header(), extracted.blocks)
        ...     updates.append(update)
        >>> result = merge_updates(updates)
        >>> sorted(result.state_dict), result.solved
        (['bias', 'weight'], True)
    """
    options = MergeOptions(
        method,
        keep_best,
        max_iterations,
        max_influence,
        skip_invalid,
        memory_budget,
        allow_duplicates,
    )
    if validation_loader is not None and model is None:
        raise ValueError("a validation loader needs a model to run: pass model=...")
    if isinstance(validation_loader, Iterator):
        raise ValueError("validation takes one pass an epoch: pass a DataLoader or a list")
    where = torch.device(device)
    merger = Merger.open(updates, options, model, statistics_loader)
    at_once = merger.method.keeps_best and validation_loader is not None
    started = time.perf_counter()
    merger.move_to(where)
    (order,) = assign_layers([layer.shape for layer in merger.layers], ranks=1)
    with progress_bar(merger.layers, "merge") as bar:
        while not merger.done:
            for index in order:
                merger.advance(index, at_once)
            merger.finish_epoch()
            bar.update(sum(state.done for state in merger.states) - bar.n)
            if validation_loader is not None and model is not None:
                merger.refresh_statistics()
                state, likelihood = merger.state_dict(), merger.likelihood
                merger.judge(*validate(model, state, validation_loader, likelihood, where))
    merger.take_best()
    merger.refresh_statistics()
    merger.seconds = time.perf_counter() - started
    result = merger.result()
    for warning in result.warnings:
        warnings.warn(warning, stacklevel=2)
    return result
