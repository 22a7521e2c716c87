"""Which samples curvature is of, and that batches, order, workers and passes change no number."""

import pytest
import torch
from helpers.networks import (
    BATCH,
    EXTRACTED,
    IMAGE,
    MC,
    NETS,
    SAMPLES,
    VECTOR,
    build_net,
    extract,
    ignore_padding,
    make_data,
    make_recorded,
)
from oracles.curvature import are_equal
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_fedfisher.extraction.accumulators import model_sums as second_moments
from lightning_fedfisher.extraction.fisher_types import FISHER_TYPES


@pytest.mark.parametrize("kind", EXTRACTED)
@pytest.mark.parametrize("fisher", FISHER_TYPES)
def test_batches_do_not_matter(kind, fisher):
    model, data = build_net("lenet"), make_data(IMAGE, 21)
    expected = extract(model, data, kind, fisher=fisher, batch_size=21, **MC)
    for batch_size in (1, 4, 50):
        found = extract(model, data, kind, fisher=fisher, batch_size=batch_size, **MC)
        assert found.num_samples == 21
        assert are_equal(found, expected, 1e-12)


def test_mc_draws_depend_on_the_seed_and_their_number():
    model, data = build_net("lenet"), make_data(IMAGE)
    options = {"fisher": "mc", "draws": 2}
    expected = extract(model, data, seed=0, **options)
    assert are_equal(extract(model, data, seed=0, **options), expected)
    assert not are_equal(extract(model, data, seed=1, **options), expected, 1e-3)
    assert not are_equal(extract(model, data, seed=0, fisher="mc", draws=3), expected, 1e-3)


def test_mc_approaches_exact():
    model, data = build_net("lenet"), make_data(IMAGE, 3)
    exact = extract(model, data, "diagonal", fisher="exact", tolerance=0.0)
    few, many = (extract(model, data, "diagonal", fisher="mc", draws=n, seed=1) for n in (2, 400))
    assert are_equal(many, exact, 0.2)
    assert not are_equal(few, exact, 0.2)


@pytest.mark.parametrize("kind", EXTRACTED)
def test_order_does_not_matter(kind):
    model, data = build_net("lenet"), make_data(IMAGE, 21)
    expected = extract(model, data, kind)
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, drop_last=True)
    assert are_equal(extract(model, loader, kind), expected)
    reverse = TensorDataset(*(tensor.flip(0) for tensor in data.tensors))
    assert are_equal(extract(model, reverse, kind), expected, 1e-12)


def test_workers_do_not_matter():
    model, data = build_net("lenet"), make_data(IMAGE, 21)
    loaders = [
        DataLoader(data, batch_size=BATCH, shuffle=True, num_workers=workers) for workers in (0, 2)
    ]
    one, two = (extract(model, loader, fisher="mc") for loader in loaders)
    assert are_equal(one, two)


def test_every_call_gives_the_same_numbers():
    model, data = build_net("functional"), make_data(IMAGE)
    for kind in EXTRACTED:
        assert are_equal(extract(model, data, kind), extract(model, data, kind))


@pytest.mark.parametrize("kind", EXTRACTED)
def test_max_samples_is_a_seeded_subset(kind):
    model, chosen, extracted = build_net("lenet"), [], []
    for seed in (0, 0, 1):
        data = make_recorded()
        extracted.append(
            extract(model, DataLoader(data, batch_size=4), kind, max_samples=10, seed=seed)
        )
        chosen.append(sorted(set(data.read)))
        assert (extracted[-1].num_samples, extracted[-1].population) == (10, 21)
        assert len(chosen[-1]) == 10
    assert chosen[0] == chosen[1] != chosen[2]
    assert are_equal(extracted[0], extracted[1])
    assert not are_equal(extracted[0], extracted[2], 1e-3)
    subset = DataLoader(Subset(make_recorded(), chosen[0]), batch_size=4)
    assert are_equal(extracted[0], extract(model, subset, kind))


@pytest.mark.parametrize("max_samples", [21, 1000])
def test_max_samples_of_no_fewer_than_there_are_is_all(max_samples):
    model, data = build_net("lenet"), make_data(IMAGE, 21)
    assert are_equal(extract(model, data, max_samples=max_samples), extract(model, data))


@ignore_padding
@pytest.mark.parametrize("net", ["lenet", "positions", "embedding", "transposed", "called twice"])
@pytest.mark.parametrize("fisher", FISHER_TYPES)
def test_ekfac_of_one_pass_is_that_of_two(net, fisher, monkeypatch):
    model, data = build_net(net), make_recorded(NETS[net][1])
    once = extract(model, data, "ekfac", fisher=fisher, **MC)
    reads = len(data.read)
    monkeypatch.setattr(second_moments, "_KEPT_BYTES", 0)
    data.read.clear()
    twice = extract(model, data, "ekfac", fisher=fisher, **MC)
    assert len(data.read) == reads + 21
    for name, block in once.blocks.items():
        found = twice.blocks[name].tensors()
        for field, tensor in block.tensors().items():
            assert (found[field] - tensor).abs().max() <= 1e-12 * tensor.abs().max()


def test_a_subset_sampler_is_honoured():
    model, data = build_net("lenet"), make_recorded()
    loader = DataLoader(data, batch_size=4, sampler=SubsetRandomSampler([11, 3, 5, 18]))
    extracted = extract(model, loader)
    assert set(data.read) == {3, 5, 11, 18}
    assert extracted.num_samples == extracted.population == 4
    assert are_equal(extracted, extract(model, DataLoader(Subset(data, [3, 5, 11, 18]))), 1e-12)


def test_identity_needs_no_pass():
    class Unreadable(TensorDataset):
        def __getitem__(self, index):
            raise AssertionError("identity curvature read a sample")

    extracted = extract(build_net("lenet"), Unreadable(torch.zeros(5, 1)), "identity")
    assert extracted.discarded == 0
    assert {name: block.kind for name, block in extracted.blocks.items()} == dict.fromkeys(
        ("0", "4", "6"), "identity"
    )
    assert (extracted.num_samples, extracted.population) == (0, 5)
    assert all(extracted.blocks[layer.name].shape == layer.shape for layer in extracted.layers)


@pytest.mark.parametrize(
    "loader",
    [lambda: DataLoader(TensorDataset(torch.zeros(0, 4))), list, lambda: iter([])],
    ids=["data set", "list", "iterator"],
)
def test_a_client_without_samples(loader):
    with pytest.raises(ValueError, match="holds no samples"):
        extract(nn.Linear(4, 3), loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": WeightedRandomSampler([1.0] * SAMPLES, SAMPLES)}, "WeightedRandomSampler"),
        (
            {"batch_sampler": type("Mine", (BatchSampler,), {})(range(SAMPLES), 2, False)},
            "custom batch sampler",
        ),
        ({"batch_sampler": [[0, 1], [2]]}, "custom batch sampler"),
    ],
    ids=["weighted", "subclass", "list"],
)
def test_samplers_that_hide_which_samples_are_trained_on(options, message):
    with pytest.raises(ValueError, match=message):
        extract(nn.Linear(4, 3), DataLoader(make_data(VECTOR), **options))


def test_a_plain_batch_sampler_is_read():
    data = make_data(VECTOR)
    for sampler, samples in (
        (SequentialSampler(data), SAMPLES),
        (SubsetRandomSampler([1, 2, 3]), 3),
    ):
        loader = DataLoader(data, batch_sampler=BatchSampler(sampler, 2, False))
        extracted = extract(nn.Linear(4, 3), loader)
        assert extracted.num_samples == extracted.population == samples
    weighted = WeightedRandomSampler([1.0] * SAMPLES, SAMPLES)
    loader = DataLoader(data, batch_sampler=BatchSampler(weighted, 2, False))
    with pytest.raises(ValueError, match="WeightedRandomSampler"):
        extract(nn.Linear(4, 3), loader)


@pytest.mark.parametrize("max_samples", ["all", 2.5, True])
def test_max_samples_of_another_kind(max_samples):
    with pytest.raises(ValueError, match="max_samples must be at least 1, None or 'auto'"):
        extract(build_net("lenet"), make_data(IMAGE), max_samples=max_samples)
