"""Which samples a rehearsal runs: those whose labels are the most unusual of all.

One label in a thousand that no class has stops an extraction after hours of training. A data set
that keeps its labels in one place shows them all at once: the samples of the least and the greatest
label, and of one that is no number, tell whether all others are fit for use. They are run as any
other sample, with all that the loader and the model do to their labels.
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
        [1, 3]
    """
    indices = trained_indices(dataloader)
    if indices is None:
        return None
    assert isinstance(dataloader, DataLoader)
    labels = _labels(dataloader.dataset)
    found: list[int] = []
    if labels is not None and labels.ndim and len(labels) > max(indices):
        own = labels[torch.tensor(indices)].reshape(len(indices), -1).double()
        if own.shape[1]:
            own, no_number = own.nan_to_num(0.0), ~own.isfinite().all(dim=1)
            found = [int(own.amin(1).argmin()), int(own.amax(1).argmax())]
            found += no_number.nonzero().flatten().tolist()[:1]
    picked = list(dict.fromkeys([*found, *range(min(fewest, len(indices)))]))  # each once
    return [indices[place] for place in sorted(picked[: max(fewest, len(set(found)))])]


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
