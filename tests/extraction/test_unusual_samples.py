"""The samples of a rehearsal: those of the most unusual labels."""

import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_fedfisher.extraction.unusual_samples import unusual_samples

X = torch.zeros(6, 2)


def _picked(data, fewest=2, **options):
    return unusual_samples(DataLoader(data, **options), fewest)


def test_the_least_and_the_greatest_label_and_one_that_is_no_number_are_picked():
    assert _picked(TensorDataset(X, torch.tensor([1, 1, 0, 1, 255, 1]))) == [0, 2, 4]
    # One value may stand for what is not observed, and the next for an error.
    assert _picked(TensorDataset(X, torch.tensor([1, -100, 0, -1, 255, 17]))) == [1, 3, 4, 5]
    labels = torch.tensor([0.5, 0.5, 0.5, torch.nan, 9.0, -1.0])
    assert _picked(TensorDataset(X, labels)) == [0, 3, 4, 5]
    # One pixel in one image.
    pixels = torch.ones(6, 3, 3, dtype=torch.long)
    pixels[4, 2, 1], pixels[1, 0, 0] = 255, -1
    assert _picked(TensorDataset(X, pixels)) == [0, 1, 4]
    assert _picked(TensorDataset(X, torch.ones(6)), fewest=3) == [0, 1, 2]


def test_subsets_and_samplers_hide_what_the_client_does_not_hold():
    data = TensorDataset(X, torch.tensor([1, 255, 0, 1, 7, 1]))
    assert _picked(Subset(Subset(data, [0, 2, 3, 4]), [3, 1, 0])) == [0, 1, 2]
    assert _picked(data, sampler=SubsetRandomSampler([0, 2, 3])) == [0, 2]


@pytest.mark.parametrize("kind", [list, torch.tensor, lambda labels: torch.tensor(labels).numpy()])
def test_labels_that_a_data_set_keeps_as_an_attribute(kind):
    class Images(Dataset):
        def __init__(self):
            self.targets = kind([1, 1, 1, 3, 0, 1])

        def __len__(self):
            return 6

        def __getitem__(self, index):
            return X[index], self.targets[index]

    assert _picked(Images()) == [0, 3, 4]


@pytest.mark.parametrize("targets", [["cat"] * 6, [0, 1], None, {"a": 1}, object()])
def test_labels_that_say_nothing_leave_the_first_samples(targets):
    class Images(Dataset):
        def __init__(self):
            self.targets = targets

        def __len__(self):
            return 6

    assert _picked(Images()) == [0, 1]


def test_loaders_without_indices():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([1])

    assert _picked(Stream()) is None
    assert unusual_samples([1, 2], 2) is None
    data = TensorDataset(X, X[:, 0])
    with pytest.raises(ValueError, match="hides which samples"):
        _picked(data, sampler=WeightedRandomSampler([1.0] * 6, 6))
