"""BatchNorm's statistics of given batches: those of PyTorch's own training mode."""

import copy

import pytest
import torch
from torch import nn

from lightning_fedfisher.batch_norms import (
    BatchStatistics,
    NoVarianceError,
    buffer_names,
    tracked_norms,
)


def test_only_what_tracks_statistics_is_found():
    model = nn.Sequential(
        nn.BatchNorm1d(2, track_running_stats=False), nn.GroupNorm(1, 2), nn.SyncBatchNorm(2)
    )
    assert list(tracked_norms(model)) == ["2"]
    assert list(tracked_norms(nn.BatchNorm1d(2))) == [""]
    assert buffer_names("") == ("running_mean", "running_var")


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2), (4, 3, 2, 5), (1, 3, 2, 2)])
def test_a_layer_normalises_by_its_batch_as_in_training(shape):
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
    norm = kinds[len(shape)](3, momentum=None).double()
    nn.init.normal_(norm.weight)
    generator = torch.Generator().manual_seed(0)
    batches = [2 + torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    watched = copy.deepcopy(norm).eval()
    statistics = BatchStatistics(watched)
    for batch in batches:
        torch.testing.assert_close(watched(input=batch), norm(batch), rtol=1e-10, atol=1e-12)
        statistics.add(weight=7)
    mean, variance = statistics.means()
    torch.testing.assert_close(mean, norm.running_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(variance, norm.running_var, rtol=1e-12, atol=1e-12)


def test_batches_count_by_their_weights():
    norm = nn.BatchNorm1d(1).eval()
    statistics = BatchStatistics(norm)
    for weight, batch in ((1, [0.0, 2.0]), (3, [4.0, 4.0]), (0, [9.0, 5.0])):
        norm(torch.tensor(batch).unsqueeze(1))
        statistics.add(weight)
    assert [float(found) for found in statistics.means()] == [3.25, 0.5]


def test_one_value_has_no_variance():
    norm = nn.BatchNorm1d(2).eval()
    statistics = BatchStatistics(norm)
    norm(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
    with pytest.raises(NoVarianceError, match="use larger batches"):
        norm(torch.ones(1, 2))
    statistics.add(weight=0)  # and what came before in the same batch is forgotten
    assert not statistics.sums.any()
