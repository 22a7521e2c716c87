"""A small memory budget: layers wait or go to disk, and no bit of the merged model changes."""

import dataclasses
import tempfile

import pytest
import torch
from helpers.federation import tiny_loader, tiny_model
from helpers.merging import assert_same, merge, updates_by_curvature, updates_by_method
from lightning.pytorch.callbacks import LambdaCallback

from lightning_fedfisher import METHODS, FisherMergeModule
from lightning_fedfisher.merge.disk_cache import OnDiskTensors
from lightning_fedfisher.merge.eigenbasis import MatvecWithin
from lightning_fedfisher.merge.layer_loader import LayerLoader


@pytest.fixture(scope="module")
def updates(tmp_path_factory):
    """Three clients' updates for some methods."""
    methods = ("fedfisher", "fedfisher_kfac", "fedfisher_diag")
    return updates_by_method(tmp_path_factory.mktemp("updates"), methods)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Three clients' updates with each kind of curvature, and the same weights."""
    curvatures = ("identity", "diagonal", "kfac", "ekfac", "dense")
    return updates_by_curvature(tmp_path_factory.mktemp("kinds"), *curvatures)


def _bytes(clients):
    """Of all clients' weights and curvature, by layer."""
    return [
        sum(
            4 * (client.weights(layer).numel() + times * sum(map(torch.numel, tensors)))
            for client in clients
            for block in [client.block(layer)]
            for tensors in [block.tensors().values()]
            for times in [2 if block.kind == "kronecker" else 1]  # in the eigenbasis as well
        )
        for layer in clients[0].layers
    ]


@pytest.fixture
def offloads(monkeypatch, tmp_path):
    """Folders of what is kept on disk; they are looked for among the temporary ones."""
    folders, original = [], OnDiskTensors.__init__
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def recording(self, *arguments):
        original(self, *arguments)
        folders.append(self._folder)
        assert folders[-1].parent == tmp_path / "temporary"
        assert len(list(folders[-1].iterdir())) == len(self) == 3

    monkeypatch.setattr(OnDiskTensors, "__init__", recording)
    return folders


MEMORY = [
    ("identity", "fedavg"),
    ("kfac", "fedavg"),
    ("diagonal", "fisher_merge"),
    ("diagonal", "fedfisher"),
    ("kfac", "fedfisher"),
    ("kfac", "regmean"),
    ("ekfac", "fedfisher"),
    ("dense", "fedfisher"),
]


@pytest.mark.parametrize(("kind", "method"), MEMORY)
def test_memory_does_not_change_a_bit(kinds, kind, method, offloads, tmp_path, monkeypatch):
    pays = MatvecWithin._pays

    def at_once(product):
        product._products = 10**9
        return pays(product)

    monkeypatch.setattr(MatvecWithin, "_pays", at_once)
    clients = kinds[kind]
    paths = [client.save(tmp_path / f"{k}.safetensors") for k, client in enumerate(clients)]
    freely = merge(paths, tmp_path, method=method)
    assert offloads == []
    sizes = _bytes(clients)
    in_work = []

    def note_sizes(trainer, module, *_):
        in_work.append([sizes[index] for index in module.merger.solvers])

    for budget in (0, min(sizes), sorted(sizes)[2], max(sizes), sum(sizes) - 1):
        offloads.clear()
        in_work.clear()
        watch = {"callbacks": [LambdaCallback(on_train_batch_end=note_sizes)]}
        module = merge(paths, tmp_path, method=method, memory_budget=budget, trainer=watch)
        assert_same(module.merged_state_dict(), freely.merged_state_dict(), rtol=0, atol=0)
        # What is bounded at each use lies elsewhere in memory, which may change its last digit.
        assert module.history[-1] == pytest.approx(freely.history[-1], rel=1e-12)
        offloaded = 0 if method == "fedavg" else sum(size > budget for size in sizes)
        again = 2 if kind == "kfac" else 1  # in the eigenbasis as well
        # No curvature is left of FedAvg's; what is known of merged layers takes room as well.
        assert (
            offloaded * again <= len(offloads) <= offloaded * again + len(clients[0].header.fed_by)
        )
        assert not any(folder.exists() for folder in offloads)
        assert all(len(now) <= 1 or sum(now) <= budget for now in in_work)


def test_layers_wait_for_room(kinds, tmp_path):
    single = dataclasses.replace(
        METHODS["fedfisher"], name="not aligned", steps_per_epoch=1, aligns=False
    )
    freely = merge(kinds["kfac"], tmp_path, method=single)
    alone = merge(kinds["kfac"], tmp_path, method=single, memory_budget=0)
    # The next layer begins in the epoch in which the one before it is solved.
    assert len(freely.history) > 1
    assert len(alone.history) > len(freely.history)
    assert alone.history[0]["residual"] == 1
    assert freely.history[0]["residual"] < 1
    assert_same(alone.merged_state_dict(), freely.merged_state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["fedfisher_kfac", "fedfisher_diag"])
@pytest.mark.parametrize("labels", [False, True], ids=["alone", "labels"])
def test_memory_does_not_change_published_methods(updates, method, labels, offloads, tmp_path):
    loader = tiny_loader(seed=50, samples=40, shuffle=False) if labels else None

    def run(**options):
        model = tiny_model() if labels else None
        return merge(
            updates[method],
            tmp_path,
            loader,
            method=method,
            model=model,
            max_iterations=300,
            **options,
        )

    freely = run()
    small = run(memory_budget=0)
    assert_same(small.merged_state_dict(), freely.merged_state_dict(), rtol=0, atol=0)
    assert len(offloads) == 4
    assert not any(folder.exists() for folder in offloads)
    if labels:
        # Labels judge whole models, so all layers move at once.
        assert small.history == freely.history
        assert len(small.history) == 3
    else:
        # The next layer begins in the last epoch of the one before it.
        assert (len(freely.history), len(small.history)) == (3, 4 * (3 - 1) + 1)


@pytest.mark.parametrize("loader", [None, "unused"])
def test_a_model_without_labels_leaves_the_memory_bounded(updates, loader, tmp_path):
    in_work, val = [], loader and tiny_loader(seed=50, samples=40, shuffle=False)
    watch = LambdaCallback(
        on_train_batch_end=lambda _, module, *__: in_work.append(len(module.merger.solvers))
    )
    merge(
        updates["fedfisher_kfac"],
        tmp_path,
        val,
        method="fedfisher_kfac",
        model=tiny_model(),
        max_iterations=200,
        memory_budget=0,
        trainer={"callbacks": [watch], "limit_val_batches": 0 if val else 1.0},
    )
    assert in_work
    assert max(in_work) <= 1


def test_offloaded_folders_go_with_a_merge_that_is_stopped(updates, offloads, tmp_path):
    with pytest.warns(UserWarning, match="has not converged"):
        merge(
            updates["fedfisher_kfac"],
            tmp_path,
            method="fedfisher_kfac",
            memory_budget=0,
            trainer={"max_epochs": 1},
        )
    assert len(offloads) == 1
    assert not offloads[0].exists()


@pytest.mark.parametrize("budget", [-1, -(2**40)])
def test_negative_memory_is_refused(updates, budget):
    with pytest.raises(ValueError, match=f"memory_budget must be at least 0 bytes, got {budget}"):
        FisherMergeModule(updates["fedfisher"], memory_budget=budget)
    with pytest.raises(ValueError, match=f"memory_budget must be at least 0 bytes, got {budget}"):
        LayerLoader(updates["fedfisher"], METHODS["fedfisher"], budget)
