"""Several processes find what one process finds, and all of them the same bits."""

import copy

import pytest
import torch
from helpers.networks import BATCH, IMAGE, MC, build_net, extract, make_data, make_recorded
from helpers.ranks import run_ranks
from oracles.curvature import are_equal
from torch.utils.data import DataLoader

from lightning_fedfisher.distributed.processes import Shard
from lightning_fedfisher.extraction.accumulators import model_sums as second_moments
from lightning_fedfisher.extraction.extract import extract_curvatures


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("max_samples", [None, 10])
@pytest.mark.parametrize(
    ("kind", "fisher"),
    [
        ("kfac", "normalised"),
        ("kfac", "mc"),
        ("input_gram", "normalised"),
        ("diagonal", "exact"),
        ("dense", "empirical"),
        ("ekfac", "normalised"),
        ("ekfac", "mc"),
    ],
)
def test_processes_do_not_matter(kind, fisher, max_samples, world_size):
    model, options = build_net("lenet"), {"fisher": fisher, "max_samples": max_samples} | MC
    alone = extract(model, DataLoader(make_recorded(), batch_size=4), kind, **options)
    found, read = _run_processes(model, kind, world_size, options)
    assert len(read) == (max_samples or 21)
    for together in found:
        assert together.num_samples == alone.num_samples
        assert together.population == 21
        assert are_equal(together, alone, 1e-11)
    for name, block in found[0].blocks.items():
        for other in found[1:]:
            for field, tensor in other.blocks[name].tensors().items():
                assert torch.equal(tensor, block.tensors()[field])


def _run_processes(model, kind, world_size, options):
    """Runs all processes at once; returns what each found, and which samples were read."""
    sets = [make_recorded() for _ in range(world_size)]

    def work(shard):
        loader = DataLoader(sets[shard.rank], batch_size=4)
        return extract(copy.deepcopy(model), loader, kind, shard=shard, **options)

    return run_ranks(world_size, work), {index for data in sets for index in data.read}


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_that_pass_twice_agree_with_one_that_passes_once(world_size, monkeypatch):
    model, options = build_net("lenet"), {"fisher": "exact"} | MC
    alone = extract(model, DataLoader(make_recorded(), batch_size=4), "ekfac", **options)
    monkeypatch.setattr(second_moments, "_KEPT_BYTES", 0)
    for together in _run_processes(model, "ekfac", world_size, options)[0]:
        assert are_equal(together, alone, 1e-11)


def test_a_process_without_samples_contributes_zeros():
    model, data = build_net("lenet"), make_data(IMAGE, 2)
    passed = []

    def collect(tensor):
        passed.append(tensor)
        return torch.ones_like(tensor)

    extracted = extract(model, data, shard=Shard(2, 3, collect))
    assert extracted.num_samples == 1
    assert all(tensor.abs().max() == 0 for tensor in passed)


def test_a_reduction_in_place_counts_every_kind_once():
    kinds = ("kfac", "ekfac", "diagonal")
    model, loader = build_net("normed and grouped"), DataLoader(make_data(IMAGE), batch_size=BATCH)
    shard = Shard(total=lambda tensor: tensor.mul_(2))  # as two processes with the same samples
    twice = extract_curvatures(model, loader, kinds, shard=shard, progress=False)
    once = extract_curvatures(model, loader, kinds, progress=False)
    for kind in kinds:
        assert are_equal(twice[kind], once[kind], 1e-10)
