"""Batches without an index: lists, generators, and loaders of iterable data sets."""

import pytest
import torch
from helpers.networks import (
    BATCH,
    EXTRACTED,
    IMAGE,
    SEQUENCE,
    VECTOR,
    build_net,
    every_extracted_kind,
    extract,
    make_data,
)
from oracles.curvature import are_equal
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_fedfisher.distributed.processes import Shard
from lightning_fedfisher.extraction.accumulators import model_sums as second_moments
from lightning_fedfisher.extraction.sampling import PREVIEW


class _Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return (self.data[i] for i in range(len(self.data)))


def _iterable(form, data):
    batches = list(DataLoader(data, batch_size=BATCH))
    return {
        "list": batches,
        "generator": iter(batches),
        "stream": DataLoader(_Stream(data), batch_size=BATCH),
    }[form]


every_form = pytest.mark.parametrize("form", ["list", "generator", "stream"])


@every_form
@pytest.mark.parametrize("fisher", ["normalised", "exact", "mc"])
@pytest.mark.parametrize("kind", EXTRACTED)
def test_iterables_of_batches(kind, fisher, form):
    model, data = build_net("lenet"), make_data(IMAGE, 8)
    extracted = extract(model, _iterable(form, data), kind, fisher=fisher)
    assert (extracted.num_samples, extracted.population) == (8, None)
    # Draws cannot belong to samples that cannot be told apart.
    same = _iterable("list", data) if fisher == "mc" else data
    assert are_equal(extracted, extract(model, same, kind, fisher=fisher), 1e-12)


@every_form
@pytest.mark.parametrize("kind", EXTRACTED)
def test_no_batch_of_an_iterable_is_lost_to_an_output_changed_in_place(kind, form):
    model, data = build_net("inplace functional"), make_data(IMAGE, 8)
    extracted = extract(model, _iterable(form, data), kind)
    assert extracted.num_samples == 8
    assert are_equal(extracted, extract(model, data, kind), 1e-12)


def test_an_iterator_has_no_second_pass(monkeypatch):
    model, data = build_net("lenet"), make_data(IMAGE, 8)
    expected = extract(model, data, "ekfac")
    monkeypatch.setattr(second_moments, "_KEPT_BYTES", 0)
    for form in ("list", "stream"):
        assert are_equal(extract(model, _iterable(form, data), "ekfac"), expected, 1e-12)
    with pytest.raises(ValueError, match="two passes"):
        extract(model, _iterable("generator", data), "ekfac")


def test_max_samples_of_an_iterable_is_its_first_batches():
    model, batches = build_net("lenet"), list(DataLoader(make_data(IMAGE, 9), batch_size=BATCH))
    extracted = extract(model, batches, max_samples=4)
    assert extracted.num_samples == 6
    assert are_equal(extracted, extract(model, batches[:2]))


@every_extracted_kind
def test_a_stream_that_begins_with_a_single_sample(kind):
    # Alone, a sample's place cannot be told from a table that is the same for all samples.
    model, data = build_net("positions embedded"), make_data(SEQUENCE)
    x, y = data.tensors
    found = extract(model, [(x[:1], y[:1]), (x[1:], y[1:])], kind)
    assert are_equal(found, extract(model, data, kind), 1e-12)


def test_an_iterable_on_two_processes():
    batches = list(DataLoader(make_data(VECTOR), batch_size=2))
    with pytest.raises(ValueError, match="cannot be partitioned over processes"):
        extract(nn.Linear(4, 3), batches, shard=Shard(0, 2))


def test_tracing_a_stream_looks_at_few_samples():
    seen = []

    class Counting(nn.Linear):
        def forward(self, x):
            if torch.is_grad_enabled():
                seen.append(len(x))
            return super().forward(x)

    x = torch.randn(64, 4)
    extract(Counting(4, 3), [(x, torch.zeros(64, dtype=torch.long))])
    assert seen == [PREVIEW, 64]
