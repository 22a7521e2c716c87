"""Checkpoints of a merge: what a resumed one keeps, redoes, and refuses."""

import dataclasses
import warnings

import pytest
import torch
from helpers.federation import quiet_trainer, tiny_loader, tiny_model
from helpers.merging import (
    assert_same,
    interrupted,
    merge,
    resumed,
    updates_by_method,
    with_header,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher import METHODS, ClientUpdate, FisherMergeModule, extract_curvature
from lightning_fedfisher.merge.checkpoint import fingerprint
from lightning_fedfisher.merge.layer_loader import LayerLoader
from lightning_fedfisher.merge.solvers import ConjugateGradient, PublishedServer


@pytest.fixture(scope="module")
def updates(tmp_path_factory):
    """Three clients' updates for two methods."""
    methods = ("fedfisher", "fedfisher_kfac")
    return updates_by_method(tmp_path_factory.mktemp("updates"), methods)


def test_a_resumed_merge_gives_the_same_model(updates, tmp_path):
    clients = updates["fedfisher_kfac"]
    options = {"method": "fedfisher_kfac", "max_iterations": 600}  # six epochs
    whole = merge(clients, tmp_path, **options)
    checkpoint = ModelCheckpoint(tmp_path / "kept", save_last=True)
    trainer = {"callbacks": [checkpoint], "enable_checkpointing": True, "max_epochs": 3}
    with pytest.warns(UserWarning, match="has not converged"):
        merge(clients, tmp_path, trainer=trainer, **options)
    module = FisherMergeModule(clients, **options)
    quiet_trainer(tmp_path, max_epochs=-1).fit(
        module, ckpt_path=checkpoint.last_model_path, weights_only=True
    )
    assert_same(module.merged_state_dict(), whole.merged_state_dict(), rtol=0, atol=0)


@pytest.fixture
def read(monkeypatch):
    """Indices of the layers whose problems are read, as they are."""
    indices, original = [], LayerLoader.read

    def recording(self, index, *arguments):
        indices.append(index)
        return original(self, index, *arguments)

    monkeypatch.setattr(LayerLoader, "read", recording)
    return indices


@pytest.mark.parametrize("method", ["fedfisher", "fedfisher_kfac"])
def test_a_resumed_merge_keeps_the_layers_that_were_solved(updates, method, read, tmp_path):
    # One layer after the other, so that some are solved when it stops.
    row = dataclasses.replace(METHODS[method], steps_per_epoch=1 if method == "fedfisher" else 100)
    options = {"method": row, "memory_budget": 0, "max_iterations": 200}
    whole = merge(updates[method], tmp_path, **options)
    assert sorted(read) == [0, 1, 2, 3]
    order = read.copy()
    read.clear()
    stop = len(whole.history) // 2
    first, path = interrupted(updates[method], tmp_path, stop, **options)
    assert 1 < len(read) < 4
    begun = read.copy()
    read.clear()
    second = resumed(path, updates[method], tmp_path, **options)
    # The last one begun may not have been solved.
    assert read in ([i for i in order if i not in begun], [i for i in order if i not in begun[:-1]])
    assert_same(second.merged_state_dict(), whole.merged_state_dict(), rtol=0, atol=0)
    assert second.history[:stop] == first.history == whole.history[:stop]
    assert len(second.history) > stop
    assert second.history[-1] == whole.history[-1]


def test_a_solved_merge_resumes_without_reading_a_layer(updates, read, tmp_path):
    first, path = interrupted(updates["fedfisher"], tmp_path, -1)
    assert sorted(read) == [0, 1, 2, 3]
    read.clear()
    second = resumed(path, updates["fedfisher"], tmp_path)
    assert read == []
    assert_same(second.merged_state_dict(), first.merged_state_dict(), rtol=0, atol=0)
    assert second.history == [*first.history, first.history[-1]]


def test_a_checkpoint_of_another_merge_is_refused(updates, tmp_path):
    clients = updates["fedfisher"]
    _, path = interrupted(clients, tmp_path, 1)
    recounted = [
        ClientUpdate.from_model(_loaded(u), dataclasses.replace(u.header, num_samples=7), u.blocks)
        for u in clients
    ]
    for others, method in (
        (clients[:2], "fedfisher"),
        (clients[::-1], "fedfisher"),
        (updates["fedfisher_kfac"][:1] * 3, "fedfisher"),
        (recounted, "fedfisher"),
        (clients, "regmean"),
        (clients, "fedavg"),
    ):
        with pytest.raises(ValueError, match=r"is of another merge.* same updates.* same method"):
            resumed(path, others, tmp_path, method=method)
    resumed(path, clients, tmp_path)


def _loaded(update):
    model = tiny_model()
    model.load_state_dict(update.parameters)
    return model


@pytest.mark.parametrize("other", [("ekfac", "normalised"), ("kfac", "exact")])
def test_a_checkpoint_of_other_curvature_of_the_same_weights_is_refused(updates, other, tmp_path):
    clients, (kind, fisher) = updates["fedfisher"], other
    _, path = interrupted(clients, tmp_path, 1)
    others = []
    for client in clients:
        model = _loaded(client)
        extracted = extract_curvature(model, tiny_loader(), kind, fisher=fisher, progress=False)
        header = extracted.header(client.num_samples)
        others.append(ClientUpdate.from_model(model, header, extracted.blocks))
    with pytest.raises(ValueError, match="is of another merge"):
        resumed(path, others, tmp_path)


def _scaled(block):
    return block.from_tensors({n: 2 * t for n, t in block.tensors().items()}, block.shape)


def test_a_checkpoint_of_curvature_with_other_values_is_refused(updates, tmp_path):
    clients = updates["fedfisher"]
    _, path = interrupted(clients, tmp_path, 1)
    first, model = clients[0], _loaded(clients[0])
    altered = {**first.blocks, "network.2": _scaled(first.blocks["network.2"])}
    other = ClientUpdate.from_model(model, first.header, altered)
    header = dataclasses.replace(first.header, curvature_samples=first.num_samples + 1)
    recounted = ClientUpdate.from_model(model, header, first.blocks)
    for update in (other, recounted):
        for source in (update, update.save(tmp_path / "other.safetensors")):
            with pytest.raises(ValueError, match="is of another merge"):
                resumed(path, [source, *clients[1:]], tmp_path)


def test_a_merge_of_updates_in_memory_resumes_from_their_files(updates, read, tmp_path):
    clients = updates["fedfisher"]
    whole, path = interrupted(clients, tmp_path, -1)
    files = [client.save(tmp_path / f"{k}.safetensors") for k, client in enumerate(clients)]
    noted = dataclasses.replace(clients[0].header, metadata={"note": "a copy"})
    files[0] = ClientUpdate.from_model(_loaded(clients[0]), noted, clients[0].blocks).save(
        tmp_path / "noted.safetensors"
    )
    read.clear()
    second = resumed(path, files, tmp_path)
    assert read == []
    assert_same(second.merged_state_dict(), whole.merged_state_dict(), rtol=0, atol=0)


def _tempered(power):
    return lambda curvature: curvature.power(power)


ROW = dataclasses.replace(METHODS["fedfisher"], name="own", transform=_tempered(0.4))


ROWS = [
    METHODS["fedfisher"],
    ROW,
    dataclasses.replace(ROW, name="another"),
    dataclasses.replace(ROW, client_weight_power=1.0),
    dataclasses.replace(METHODS["fedfisher"], max_influence=3.0),
    dataclasses.replace(METHODS["fedfisher"], steps_per_epoch=1),
]


def test_methods_are_told_apart_by_their_names_and_numbers(updates, tmp_path):
    clients = updates["fedfisher"]
    assert len({fingerprint(row, clients) for row in ROWS}) == len(ROWS)
    _, path = interrupted(clients, tmp_path, 1, method=ROW)
    with pytest.raises(ValueError, match="is of another merge"):
        resumed(path, clients, tmp_path, method=ROWS[2])
    resumed(path, clients, tmp_path, method=dataclasses.replace(ROW, transform=_tempered(0.4)))


def test_a_checkpoint_of_something_else_is_refused(updates, tmp_path):
    trainer = quiet_trainer(tmp_path)
    trainer.fit(tiny_model(), tiny_loader())
    trainer.save_checkpoint(tmp_path / "classifier.ckpt")
    module = FisherMergeModule(updates["fedfisher"])
    module.strict_loading = False
    with pytest.raises(ValueError, match="is of another merge"):
        quiet_trainer(tmp_path, max_epochs=-1).fit(module, ckpt_path=tmp_path / "classifier.ckpt")


def test_the_best_iterate_survives_an_interruption(updates, tmp_path):
    clients = updates["fedfisher_kfac"]
    options = {"method": "fedfisher_kfac", "max_iterations": 600}  # six epochs
    loader = tiny_loader(seed=50, samples=40, shuffle=False)
    first, path = interrupted(clients, tmp_path, 3, loader, model=tiny_model(), **options)
    best = max(entry["val_accuracy"] for entry in first.history)
    # Labels by which whatever comes later is worse.
    x, _ = loader.dataset.tensors
    worst = tiny_model()
    worst.load_state_dict(first.merged_state_dict())
    wrong = DataLoader(TensorDataset(x, worst(x).argmin(1)), batch_size=8)
    second = resumed(path, clients, tmp_path, wrong, model=tiny_model(), **options)
    assert len(second.history) == 3 + 6
    assert all(entry["val_accuracy"] < best for entry in second.history[3:])
    assert_same(second.merged_state_dict(), first.merged_state_dict(), rtol=0, atol=0)
    last = merge(clients, tmp_path, **options).merged_state_dict()
    assert any(not torch.equal(last[name], t) for name, t in second.merged_state_dict().items())


@pytest.mark.parametrize("again", [{"max_epochs": 3}, {"max_epochs": -1, "limit_train_batches": 0}])
def test_a_merge_resumed_with_no_epoch_left_ends_as_it_would_have(updates, again, tmp_path):
    clients, options = updates["fedfisher_kfac"], {"method": "fedfisher_kfac"}
    loader = tiny_loader(seed=50, samples=40, shuffle=False)
    x, _ = loader.dataset.tensors
    start = tiny_model()
    start.load_state_dict(FisherMergeModule(clients, **options).merged_state_dict())
    # Labels by which the merge gets worse, so that the best iterate is not the last.
    right = DataLoader(TensorDataset(x, start(x).argmax(1)), batch_size=8)
    first, path = interrupted(clients, tmp_path, 3, right, model=tiny_model(), **options)
    saved = torch.load(path, weights_only=True)["state_dict"]
    merged = first.merged_state_dict()
    assert any(
        not torch.equal(first.layers[k].join(merged), saved[f"merged.{k}"]) for k in range(4)
    )
    model = tiny_model(seed=9)
    module = FisherMergeModule(clients, model=model, **options)
    with pytest.warns(UserWarning, match="has not converged"):
        quiet_trainer(tmp_path, **again).fit(module, ckpt_path=path, weights_only=True)
    assert module.history == first.history
    assert_same(module.merged_state_dict(), merged, rtol=0, atol=0)
    assert_same(dict(model.state_dict()), merged, rtol=0, atol=0)


@pytest.mark.parametrize(("slow", "redone"), [(0, [0, 1, 2]), (1, [1, 2]), (2, [2]), (3, [3])])
def test_what_ran_out_of_iterations_is_redone_with_all_that_reads_it(
    updates, slow, redone, read, tmp_path
):
    clients = updates["fedfisher"]
    shape = clients[0].layers[slow].shape

    def solver(problem):
        if problem.average.shape == shape:
            return PublishedServer(problem, damping_inside=True)
        return ConjugateGradient(problem, rcond=1e-3)

    row = dataclasses.replace(METHODS["fedfisher"], name="own", solver=solver)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*has not converged")
        whole = merge(clients, tmp_path, method=row, max_iterations=240)
        assert sorted(read) == [0, 1, 2, 3]
        first, path = interrupted(clients, tmp_path, -1, method=row, max_iterations=200)
        iterations = [state.iterations for state in first.merger.states]
        assert [index for index, steps in enumerate(iterations) if steps >= 200] == [slow]
        read.clear()
        resumed(path, clients, tmp_path, method=row, max_iterations=200)
        assert read == []
        second = resumed(path, clients, tmp_path, method=row, max_iterations=240)
    assert read == redone
    assert_same(second.merged_state_dict(), whole.merged_state_dict(), rtol=0, atol=0)


def test_a_merge_resumed_with_more_iterations_goes_on_with_what_ran_out(updates, tmp_path):
    whole = merge(updates["fedfisher"], tmp_path)
    checkpoint = ModelCheckpoint(tmp_path / "short", save_last=True)
    options = {"callbacks": [checkpoint], "enable_checkpointing": True}
    with pytest.warns(UserWarning, match="has not converged"):
        merge(updates["fedfisher"], tmp_path, max_iterations=1, trainer=options)
    module = FisherMergeModule(updates["fedfisher"])
    quiet_trainer(tmp_path, max_epochs=-1).fit(
        module, ckpt_path=checkpoint.last_model_path, weights_only=True
    )
    assert_same(module.merged_state_dict(), whole.merged_state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("changes", [{"output_layer": ""}, {"fed_by": {}}], ids=str)
def test_a_checkpoint_of_clients_that_ran_otherwise_is_refused(updates, changes, tmp_path):
    clients = updates["fedfisher"]
    _, path = interrupted(clients, tmp_path, 1)
    with pytest.raises(ValueError, match="is of another merge"):
        resumed(path, [with_header(client, **changes) for client in clients], tmp_path)
