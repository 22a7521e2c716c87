"""Running out of memory: batches are halved until they fit, and every sample counts once."""

import itertools

import pytest
import torch
from helpers.networks import EXTRACTED, IMAGE, MC, Net, build_net, extract, make_data
from oracles.curvature import are_equal
from torch import nn
from torch.utils.data import DataLoader

from lightning_fedfisher.extraction.accumulators import model_sums as second_moments
from lightning_fedfisher.extraction.fisher_types import FISHER_TYPES


def _hungry(most, fails=lambda: True):
    """A LeNet that has no memory for batches of more samples than some."""
    lenet = build_net("lenet")

    def forward(net, x):
        if len(x) > most and fails():
            raise torch.OutOfMemoryError("no memory")
        return net.body(x)

    return Net(forward, body=lenet)


@pytest.mark.parametrize("kind", EXTRACTED)
@pytest.mark.parametrize("fisher", FISHER_TYPES)
def test_batches_are_halved_until_they_fit(kind, fisher):
    model, data = _hungry(5), make_data(IMAGE, 21)
    with pytest.warns(UserWarning, match="memory did not suffice") as caught:
        found = extract(model, data, kind, fisher=fisher, batch_size=20, **MC)
    said = [str(w.message) for w in caught if "memory did not suffice" in str(w.message)]
    assert ["batches of 20 samples" in words for words in said] == [True, False]
    assert "in batches of 5" in said[1]
    assert found.num_samples == 21
    assert are_equal(found, extract(_hungry(99), data, kind, fisher=fisher, batch_size=5, **MC))


@pytest.mark.parametrize("passes", [1, 2])
def test_memory_may_run_out_at_any_time(passes, monkeypatch):
    if passes == 2:
        monkeypatch.setattr(second_moments, "_KEPT_BYTES", 0)
    data = make_data(IMAGE, 13)  # three batches, the last of one sample
    expected = extract(_hungry(99), data, "ekfac", fisher="mc", **MC)
    counted = itertools.count()
    extract(_hungry(0, lambda: next(counted) < 0), data, "ekfac", fisher="mc", batch_size=6, **MC)
    for when in range(1, next(counted)):
        calls = itertools.count()
        model = _hungry(0, lambda calls=calls, when=when: next(calls) == when)
        with pytest.warns(UserWarning, match="batches of 6 samples"):
            found = extract(model, data, "ekfac", fisher="mc", batch_size=6, **MC)
        assert found.num_samples == 13
        assert found.discarded <= 1e-15
        assert are_equal(found, expected, 1e-12)


def test_a_batch_of_one_that_does_not_fit_is_an_error():
    with (
        pytest.warns(UserWarning, match="in batches of 1$"),
        pytest.raises(torch.OutOfMemoryError, match="no memory"),
    ):
        extract(_hungry(0), make_data(IMAGE), batch_size=2)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        extract(_hungry(0), list(DataLoader(make_data(IMAGE), batch_size=4)))


def test_other_errors_are_not_tried_again():
    def forward(net, x):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        extract(Net(forward, head=nn.Linear(2, 2)), make_data(IMAGE))
