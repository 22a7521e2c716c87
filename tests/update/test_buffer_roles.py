"""Running statistics are known by their names, and refused where they cannot be merged."""

import pytest
import torch
from helpers.small_updates import linear, update_of
from torch import nn

from lightning_fedfisher import UpdateError
from lightning_fedfisher.update.buffer_roles import buffer_role, variance_partner


def test_running_statistics_are_known_by_their_names():
    assert variance_partner("a.norm.running_var") == "a.norm.running_mean"
    assert variance_partner("running_var") == "running_mean"
    for name in ("running_mean", "norm.num_batches_tracked", "running_var.scale", ""):
        assert variance_partner(name) is None
    assert buffer_role("a.running_var") == "values"
    assert buffer_role("a.running_mean") == "mean"
    assert buffer_role("a.num_batches_tracked") is None
    assert buffer_role("buffers/a.running_var") == "values"


@pytest.mark.parametrize(
    ("statistic", "value", "reason"),
    [
        ("running_var", -1.0, r"buffers/2\.running_var holds negative values"),
        ("running_var", 1e19, r"buffers/2\.running_var holds values up to"),
        ("running_mean", -1e19, r"buffers/2\.running_mean holds values up to"),
    ],
)
def test_running_statistics_that_cannot_be_merged_are_refused(statistic, value, reason):
    model = nn.Sequential(linear(), nn.Linear(3, 2), nn.BatchNorm1d(2, affine=False))
    update_of(model)
    getattr(model[2], statistic).fill_(value)
    with pytest.raises(UpdateError, match=reason):
        update_of(model)


def test_other_buffers_may_be_negative_and_large():
    model = nn.Sequential(linear(), nn.Linear(3, 2))
    model.register_buffer("offset", torch.tensor([-3e38, 3e38]))
    model.register_buffer("running", torch.tensor([-(2**62), 2**62]))
    update_of(model).verify()
