"""The merged model's running statistics, estimated on unlabelled samples of the server.

BatchNorm normalises by the mean and variance that its inputs had in training. No client trained the
merged weights, so no client's statistics fit them: merged outputs vary less, and more so the deeper
the network (REPAIR, Jordan et al., 2023). A few samples without labels show what they are.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_fedfisher._utils.random_states import kept_random_states
from lightning_fedfisher.batch_norms import (
    BatchStatistics,
    buffer_names,
    tracked_norms,
)
from lightning_fedfisher.distributed.progress import progress_bar
from lightning_fedfisher.merge.loaded_model import loaded_copy, to_device

_FEWEST = 2  # samples of a batch: one alone may have no variance

Estimate = Callable[[Mapping[str, Tensor], torch.device], tuple[dict[str, Tensor], int]]
"""Finds the running statistics of a model with given weights, and the number of samples it saw."""


def estimator(model: nn.Module | None, batches: Iterable[Any]) -> Estimate:
    """Checks that a model and samples can give statistics, and returns what computes them.

    The first batch is run, so that what cannot be run is known before the merge.

    Args:
        model: The model that will be run; None if there is none.
        batches: The samples.

    Returns:
        A function of the merged state and the device.

    Raises:
        ValueError: If there is no model, or it has no running statistics, or if the samples can be
            read only once, or are none that the model takes.
    """
    if model is None:
        raise ValueError("a statistics loader needs a model to run: pass model=...")
    if not tracked_norms(model):
        raise ValueError(
            "the model has no BatchNorm with running statistics to estimate: leave the statistics "
            "loader out"
        )
    if isinstance(batches, Iterator):
        raise ValueError("statistics may take several passes: pass a DataLoader or a list")
    with _same_random_numbers():
        first = list(itertools.islice(batches, 1))
    device = next(itertools.chain(model.parameters(), model.buffers())).device
    try:
        estimate_statistics(model, first, {}, device)
    except Exception as error:  # whatever a model says of inputs that it does not take
        raise ValueError(
            "the statistics loader must give shuffled batches of inputs, or tuples and lists that "
            f"begin with them; of its first batch: {error}"
        ) from error
    return partial(estimate_statistics, model, batches)


def estimate_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    state: Mapping[str, Tensor],
    device: torch.device,
) -> tuple[dict[str, Tensor], int]:
    """Runs a model with the merged weights, and takes its running statistics anew.

    Each layer normalises by the statistics of the batch, as in training, so that the layers behind
    it see what they will see. Everything else is in eval mode: nothing is dropped at random.

    Args:
        model: The model; it is not changed.
        batches: Inputs, or tuples and lists of which the first item is the input. Shuffled, and of
            some dozens of samples: of one class alone, they vary less. A batch of a single sample,
            as the last may be, is left out.
        state: The merged parameters and buffers by name; what is missing keeps the model's values.
        device: Where to run.

    Returns:
        Running means and variances by buffer name, as means over batches (of layers that run
        several times, over calls), each with the weight of its samples; and the number of samples.

    Raises:
        ValueError: If there are no samples, or statistics leave the finite numbers; all such are
            named.

    Example:
        >>> model, x = nn.Sequential(nn.BatchNorm1d(1, affine=False)), torch.tensor([[1.0], [3.0]])
        >>> found, samples = estimate_statistics(model, [x], {}, torch.device("cpu"))
        >>> found["0.running_mean"], found["0.running_var"], samples
        (tensor([2.]), tensor([2.]), 2)
    """
    copied = loaded_copy(model, state, device)
    samples, norms = 0, tracked_norms(copied)
    sums = {path: BatchStatistics(norm) for path, norm in norms.items()}
    with torch.no_grad(), _same_random_numbers():
        for batch in progress_bar(batches, "running statistics", None):
            inputs = to_device(batch[0] if isinstance(batch, list | tuple) else batch, device)
            count = _count(inputs)
            if count < _FEWEST:
                continue
            samples += count
            copied(inputs)
            for each in sums.values():
                each.add(count)
    if not samples:
        raise ValueError("the statistics loader gives no batch of two samples or more")
    found = {
        name: value.to(copied.get_buffer(name))
        for path, each in sums.items()
        if each.sums[-1]  # of what was run at all
        for name, value in zip(buffer_names(path), each.means(), strict=True)
    }
    if lost := [name for name, tensor in found.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{', '.join(lost)} are not finite on the samples of the server")
    return found, samples


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Puts every random state at a start, and back: a loader that shuffles or augments draws."""
    with kept_random_states():
        random.seed(0)
        np.random.seed(0)
        torch.default_generator.manual_seed(0)  # and no GPU's: samples are drawn on the CPU
        yield


def _count(inputs: Any) -> int:
    """Counts the samples of a batch: the first dimension of its first tensor."""
    sizes: list[int] = []
    apply_to_collection(inputs, Tensor, lambda tensor: sizes.append(len(tensor)))
    if not sizes:
        raise ValueError(f"a batch of {type(inputs).__name__} holds no tensor")
    return sizes[0]
