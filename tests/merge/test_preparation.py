"""Curvature that ranks prepare beforehand: whose it is, and that it is the loader's to the bit."""

import queue
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product

import pytest
import torch
from helpers.federation import tiny_data, tiny_model
from helpers.merging import update_of

from lightning_fedfisher.merge.layer_loader import LayerLoader
from lightning_fedfisher.merge.methods import METHODS
from lightning_fedfisher.merge.preparation import prepare_by_ranks

CPU = torch.device("cpu")
LAYERS = [0, 1, 2, 3]  # of the tiny model; 1 and 2 are aligned, and 1 costs most, then 2
TIMEOUT = 60  # seconds until a rank that waits for another gives up


@pytest.fixture(scope="module")
def clients():
    """By kind of curvature the updates of three clients."""
    return {
        kind: [update_of(tiny_model(seed), tiny_data(seed), kind) for seed in range(3)]
        for kind in ("kfac", "ekfac", "dense")
    }


@pytest.fixture
def ranks_of(monkeypatch):
    """Runs a function of the rank once for each of several ranks, which are threads."""
    here, boxes = threading.local(), {}

    def send(objects, destination):
        boxes[here.rank, destination].put([*objects])

    def receive(objects, source):
        objects[:] = boxes[source, here.rank].get(timeout=TIMEOUT)

    def run(ranks, work):
        def as_rank(rank):
            here.rank = rank
            return work(rank)

        # Beforehand: two threads might each make one for the same way.
        boxes.update({way: queue.Queue() for way in product(range(ranks), repeat=2)})
        monkeypatch.setattr("torch.distributed.get_rank", lambda: here.rank)
        monkeypatch.setattr("torch.distributed.get_world_size", lambda: ranks)
        monkeypatch.setattr("torch.distributed.send_object_list", send)
        monkeypatch.setattr("torch.distributed.recv_object_list", receive)
        with ThreadPoolExecutor(ranks) as pool:
            found = [*pool.map(as_rank, range(ranks))]
        assert all(box.empty() for box in boxes.values())
        return found

    return run


def _assert_those_of_the_loader(prepared, loader):
    for index, curvatures in prepared.items():
        for ours, theirs in zip(curvatures, loader.curvatures(index, CPU), strict=True):
            assert (ours.kind, ours.shape) == (theirs.kind, theirs.shape)
            assert ours.tensors().keys() == theirs.tensors().keys()
            for name, tensor in ours.tensors().items():
                assert tensor.dtype == theirs.tensors()[name].dtype
                assert torch.equal(tensor, theirs.tensors()[name])


CASES = [  # kind, unsolved layers, and for each rank the layers that it has prepared
    ("kfac", LAYERS, [{1, 2}]),
    ("kfac", [0, 1, 3], [{1}]),
    ("kfac", [], [set()]),
    ("ekfac", LAYERS, [{1, 2}]),
    ("dense", LAYERS, [set()]),  # no layer waits for another
    ("kfac", LAYERS, [{1}, {2}]),  # the first by both ranks
    ("kfac", [0, 2, 3], [set(), {2}]),
    ("kfac", LAYERS, [{1}, {2}, set()]),  # both by all ranks
    ("ekfac", LAYERS, [{1}, {2}, set()]),
    ("dense", LAYERS, [{1}, {2}, set()]),
    ("kfac", [2], [set(), {2}, set()]),
    ("kfac", LAYERS, [{1}, {2}, set(), set(), set()]),  # more ranks than clients
]


@pytest.mark.parametrize(("kind", "unsolved", "expected"), CASES)
def test_each_rank_has_prepared_what_it_will_need(clients, kind, unsolved, expected, ranks_of):
    loaders = [LayerLoader(clients[kind], METHODS["fedfisher"]) for _ in expected]
    prepared = ranks_of(
        len(expected),
        lambda rank: prepare_by_ranks(loaders[rank], unsolved, rank, len(expected), CPU),
    )
    assert [{*layers} for layers in prepared] == expected
    for layers, loader in zip(prepared, loaders, strict=True):
        _assert_those_of_the_loader(layers, loader)


def test_one_rank_needs_no_process_group(clients):
    assert not torch.distributed.is_initialized()
    loader = LayerLoader(clients["kfac"], METHODS["fedfisher"])
    prepared = prepare_by_ranks(loader, LAYERS, rank=0, ranks=1, device=CPU)
    assert {*prepared} == {1, 2}
    _assert_those_of_the_loader(prepared, loader)


@pytest.mark.parametrize(("ranks", "busy"), [(1, [1, 1]), (2, [2, 1]), (3, [3, 3]), (5, [3, 3])])
def test_every_curvature_is_prepared_once_and_the_costly_ones_by_all(
    clients, ranks, busy, ranks_of
):
    made = Counter()  # by layer and rank

    def transform(curvature):
        made[curvature.shape, torch.distributed.get_rank()] += 1
        return curvature

    row = replace(METHODS["fedfisher"], name="own", transform=transform)
    loader = LayerLoader(clients["kfac"], row)
    ranks_of(ranks, lambda rank: prepare_by_ranks(loader, LAYERS, rank, ranks, CPU))
    shapes = [loader.layers[index].shape for index in (1, 2)]
    assert {shape for shape, _ in made} == {*shapes}
    for shape, workers in zip(shapes, busy, strict=True):
        counts = [count for (found, _), count in made.items() if found == shape]
        assert sum(counts) == 3
        assert len(counts) == workers
