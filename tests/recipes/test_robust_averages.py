"""Robust averages, against what their papers say of small examples."""

import pytest
import torch
from peers.robust_averages import coordinate_median, krum, mean, trimmed_mean

VECTORS = torch.tensor([[0.0, 0], [1, 1], [2, 2], [3, 3], [100, -100]])


def test_one_far_client_moves_the_mean_alone():
    assert mean(VECTORS, 1).tolist() == pytest.approx([21.2, -18.8])
    assert coordinate_median(VECTORS, 1).tolist() == [2, 1]
    assert trimmed_mean(VECTORS, 1).tolist() == [2, 1]
    assert krum(VECTORS, 1).tolist() in ([1, 1], [2, 2])


def test_nothing_is_trimmed_of_honest_clients():
    assert torch.equal(trimmed_mean(VECTORS, 0), mean(VECTORS, 0))
