"""Which samples a rehearsal runs: those whose labels are the most unusual of all.

One label in a thousand that no class has stops an extraction after hours of training. A data set
that keeps its labels in one place shows them all at once. The samples of the least and the greatest
labels, and of one that is no number, are run as any other sample, with all that the loader and the
model do to their labels: where these are fit for use, others are as well but for rare exceptions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_fedfisher.extraction.sampling import trained_indices

# Where data sets keep the labels of all samples, by the habits of torchvision and others.
_LABELS = ("targets", "labels", "y")
# Values at either end: one may stand for what is not observed, and the next for an error.
_EXTREMES = 2


def unusual_samples(dataloader: Iterable[Any], fewest: int) -> list[int] | None:
    """Picks samples by their labels, as far as the data set shows these.

    Args:
        dataloader: The client's samples.
        fewest: Number of samples to pick at least, if there are as many.

    Returns:
        Indices into the data set; None if the loader has no indices.

    Raises:
        ValueError: If the loader hides which samples the client trains on.

    Example:
        >>> data = TensorDataset(torch.zeros(5, 2), torch.tensor([1, 0, 2, 255, 1]))
        >>> unusual_samples(DataLoader(data), fewest=2)
        [0, 1, 2, 3]
    """
    indices = trained_indices(dataloader)
    if indices is None:
        return None
    assert isinstance(dataloader, DataLoader)
    labels = _labels(dataloader.dataset)
    found: list[int] = []
    if labels is not None and labels.numel() and len(labels) > max(indices):
        if len(indices) < len(labels):
            labels = labels[torch.tensor(indices)]
        apart = labels.reshape(len(labels), -1)  # and reduced as they are: they may be many
        for extreme, greatest in ((apart.amin(1), False), (apart.amax(1), True)):
            found += _firsts_of_extremes(extreme, greatest)
    picked = list(dict.fromkeys([*found, *range(min(fewest, len(indices)))]))  # each once
    return [indices[place] for place in sorted(picked[: max(fewest, len(set(found)))])]


def _firsts_of_extremes(values: Tensor, greatest: bool) -> list[int]:
    """First places of the most extreme values, and of one that is no number."""
    no_number = values.isnan().nonzero().flatten().tolist()[:1]
    distinct = torch.unique(values[~values.isnan()])  # ascending
    extremes = distinct[-_EXTREMES:] if greatest else distinct[:_EXTREMES]
    return no_number + [int((values == value).nonzero()[0]) for value in extremes]


def _labels(dataset: Any) -> Tensor | None:
    """The labels of all samples of a data set, in its order; None if it does not show them."""
    if isinstance(dataset, Subset):
        labels = _labels(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(list(dataset.indices))]
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[-1]
    shown = next((vars(dataset)[n] for n in _LABELS if n in getattr(dataset, "__dict__", {})), None)
    try:
        found = torch.as_tensor(shown)
    except (TypeError, ValueError, RuntimeError):  # names, or nothing
        return None
    return found if len(found.shape) and len(found) == len(dataset) else None
