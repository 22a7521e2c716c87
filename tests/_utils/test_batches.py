"""Batches of any form."""

import pytest
import torch

from lightning_fedfisher._utils.batches import count_samples


@pytest.mark.parametrize(
    "batch",
    [torch.ones(3), (torch.ones(3, 2), torch.ones(3)), {"name": "a", "x": [torch.ones(3, 1)]}],
)
def test_samples_are_counted_in_the_first_tensor(batch):
    assert count_samples(batch) == 3


def test_without_a_tensor_there_are_none():
    with pytest.raises(ValueError, match="a batch of str holds no tensor"):
        count_samples("text")
