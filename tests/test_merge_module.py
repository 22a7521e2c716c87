"""FisherMergeModule: the merge on a Trainer, its closed cases, its refusals and its manners."""

import copy
import csv
import dataclasses
import re
import tempfile
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.federation import (
    TinyClassifier,
    quiet_trainer,
    tiny_data,
    tiny_loader,
    tiny_model,
    tiny_updates,
)
from helpers.merging import assert_same, merge
from helpers.merging import interrupted as _interrupted
from helpers.merging import resumed as _resumed
from helpers.merging import with_header as _with_header
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from oracles import merge as oracle
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from lightning_fedfisher import (
    METHODS,
    ClientUpdate,
    FedFisherCallback,
    FisherMergeModule,
    MergeError,
    extract_curvature,
)
from lightning_fedfisher.curvature.base import Identity
from lightning_fedfisher.curvature.diagonal import Diagonal
from lightning_fedfisher.distributed.assignment import assign_layers, oversized_layers
from lightning_fedfisher.distributed.exchange import Item, gather_at_owner
from lightning_fedfisher.layers import Source
from lightning_fedfisher.merge.checkpoint import fingerprint
from lightning_fedfisher.merge.disk_cache import OnDiskTensors
from lightning_fedfisher.merge.layer_loader import LayerLoader
from lightning_fedfisher.merge.methods import MergeMethod
from lightning_fedfisher.merge.solvers import ClosedForm, ConjugateGradient, PublishedServer
from lightning_fedfisher.update.header import UpdateHeader

NEEDS = {
    "fedavg": ("identity", "exact"),
    "fisher_merge": ("diagonal", "exact"),
    "regmean": ("kfac", "normalised"),
    "fedfisher_diag": ("diagonal", "exact"),
    "fedfisher_kfac": ("kfac", "exact"),
    "fedfisher": ("kfac", "normalised"),
}


@pytest.fixture(scope="module")
def updates(tmp_path_factory):
    """Three clients' updates for each method."""
    root = tmp_path_factory.mktemp("updates")
    return {
        method: tiny_updates(root / method, curvature=curvature, fisher=fisher)
        for method, (curvature, fisher) in NEEDS.items()
    }


# To the bit, but for what is carried over by maps that are the identity up to rounding.
EXACT = {m: 1e-6 if row.aligns else 0.0 for m, row in METHODS.items()}


@pytest.mark.parametrize("method", METHODS)
def test_one_client_is_returned(updates, method, tmp_path):
    client, error = updates[method][0], EXACT[method]
    module = merge([client], tmp_path, method=method)
    assert_same(module.merged_state_dict(), client.parameters, rtol=error, atol=error)


@pytest.mark.parametrize("method", METHODS)
def test_identical_clients_are_returned(updates, method, tmp_path):
    client, error = updates[method][1], EXACT[method]
    module = merge([client] * 3, tmp_path, method=method)
    assert_same(module.merged_state_dict(), client.parameters, rtol=error, atol=error)


@pytest.mark.parametrize("method", METHODS)
def test_distances_to_the_clients_add_up_to_the_objective(updates, method, tmp_path):
    module = merge(updates[method], tmp_path, method=method)
    assert module.distances.shape == (len(module.layers), 3)
    assert module.distances.all()
    shares = torch.tensor([client.weight for client in module.result.clients], dtype=torch.float64)
    objective = float((module.distances.square() @ shares).sum())
    assert objective == pytest.approx(module.history[-1]["objective"], rel=1e-5)


def test_a_client_that_is_returned_is_at_no_distance(updates, tmp_path):
    assert not merge([updates["fedavg"][0]] * 2, tmp_path, method="fedavg").distances.any()


def test_fedavg_is_the_weighted_average_and_takes_any_update(updates, tmp_path):
    for kind in ("fedavg", "fedfisher"):
        clients = updates[kind]
        merged = merge(clients, tmp_path, method="fedavg").merged_state_dict()
        total = sum(client.num_samples for client in clients)
        for name in merged:
            average = sum(c.num_samples / total * c.parameters[name] for c in clients)
            torch.testing.assert_close(merged[name], average)


def _reference_closed_form(clients, power, client_weight_power=1.0):
    shares = [client.num_samples**client_weight_power for client in clients]
    merged = {}
    for layer in clients[0].layers:
        above, below = 0, 0
        for share, client in zip(shares, clients, strict=True):
            f = share * client.block(layer).diagonal().double().pow(power)
            above, below = above + f * client.weights(layer).double(), below + f
        terms = zip(shares, clients, strict=True)
        average = sum(n / sum(shares) * c.weights(layer).double() for n, c in terms)
        matrix = torch.where(below > 0, above / below, average)
        merged |= layer.split(matrix.float())
    return merged


@pytest.mark.parametrize(("method", "power"), [("fisher_merge", 1.0), ("fedfisher", 0.5)])
def test_diagonal_curvature_gives_the_closed_form(updates, method, power, tmp_path):
    clients = updates["fisher_merge"]
    module = merge(clients, tmp_path, method=method)
    reference = _reference_closed_form(clients, power, METHODS[method].client_weight_power)
    assert_same(module.merged_state_dict(), reference, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_fedfisher_is_the_minimiser_of_the_tempered_quadratic(kinds, curvature, tmp_path):
    clients = kinds[curvature]
    assert clients[0].header.fed_by == {
        "network.2": Source("network.0", "relu"),
        "network.5": Source("network.2", "relu"),
    }
    assert clients[0].header.output_layer == "network.7"
    module = merge(clients, tmp_path)
    assert module.history[-1]["residual"] < 2e-4
    state = module.merged_state_dict()
    merged = {layer.name: layer.join(state) for layer in clients[0].layers}
    for name, matrix in merged.items():
        problem = oracle.quadratic(clients, name, merged)
        average = sum(p * w for p, w, _ in zip(*problem, strict=True))
        terms = list(zip(*problem, strict=True))
        pull = sum(p * (f @ (average - w).flatten()).norm() for p, w, f in terms)
        left = sum(p * f @ (matrix.double() - w).flatten() for p, w, f in terms).norm()
        # Directions that count as ones without curvature leave a little of the gradient.
        assert left < 0.01 * pull


@pytest.mark.parametrize("method", METHODS)
def test_order_of_clients_does_not_matter(updates, method, tmp_path):
    clients = updates[method]
    options = {"method": method, "max_iterations": 200}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*has not converged")
        there = merge(clients, tmp_path, **options).merged_state_dict()
        back = merge(clients[::-1], tmp_path, **options).merged_state_dict()
    assert_same(there, back, rtol=1e-5, atol=1e-5)


def test_files_merge_like_updates_in_memory(updates, tmp_path):
    clients = updates["fedfisher"]
    paths = [client.save(tmp_path / f"{k}.safetensors") for k, client in enumerate(clients)]
    from_files = merge(paths, tmp_path).merged_state_dict()
    assert_same(from_files, merge(clients, tmp_path).merged_state_dict(), rtol=0, atol=0)


def test_the_result_is_loaded_into_the_model(updates, tmp_path):
    model = tiny_model(seed=9).train()
    module = merge(updates["fedfisher"], tmp_path, model=model)
    assert_same(dict(model.state_dict()), module.merged_state_dict(), rtol=0, atol=0)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_published_methods_keep_the_best_iterate_on_labels(updates, tmp_path):
    clients, loader = updates["fedfisher_kfac"], tiny_loader(seed=50, samples=40, shuffle=False)
    model = tiny_model()
    module = merge(clients, tmp_path, loader, method="fedfisher_kfac", model=model)
    assert module.server_labels == 40
    assert len(module.history) == 20
    assert module.history[-1]["iterations"] == 2000
    x, y = loader.dataset.tensors
    accuracy = 100 * float((model.eval()(x).argmax(1) == y).float().mean())
    assert accuracy == pytest.approx(max(entry["val_accuracy"] for entry in module.history))
    last = merge(
        clients, tmp_path, loader, method="fedfisher_kfac", model=tiny_model(), keep_best=False
    )
    alone = merge(clients, tmp_path, method="fedfisher_kfac")
    assert last.server_labels == alone.server_labels == 0
    assert_same(last.merged_state_dict(), alone.merged_state_dict(), rtol=0, atol=0)


def test_watching_labels_does_not_change_our_merge(updates, tmp_path):
    loader = tiny_loader(seed=50, samples=40, shuffle=False)
    watched = merge(updates["fedfisher"], tmp_path, loader, model=tiny_model())
    assert watched.server_labels == 0
    assert "val_accuracy" in watched.history[-1]
    alone = merge(updates["fedfisher"], tmp_path)
    assert_same(watched.merged_state_dict(), alone.merged_state_dict(), rtol=0, atol=0)


class _AlmostLinear(nn.Module):
    """Three dtypes: of the clients' weights, of the model, and whole numbers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 3))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_validation_is_in_the_dtypes_of_the_model(dtype, tmp_path):
    x, y = tiny_data(samples=30).tensors
    torch.manual_seed(0)
    start, clients = _AlmostLinear(), []
    for client in range(2):
        model = copy.deepcopy(start).to(dtype)
        model(x.to(dtype))  # for its statistics
        data = TensorDataset(x[client::2].to(dtype), y[client::2])
        clients.append(_update_of(model.eval(), data))
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    module = merge(clients, tmp_path, loader, method="fedavg", model=start)
    assert start.state_dict()["layers.2.weight"].dtype == torch.float32
    assert module.merged_state_dict()["layers.2.weight"].dtype == dtype
    loss = nn.functional.cross_entropy(start.eval()(x), y)
    assert module.history[-1]["val_nll"] == pytest.approx(float(loss), rel=1e-5)


def test_a_merge_can_be_validated_before_and_after(updates, tmp_path):
    loader = tiny_loader(seed=50, samples=40, shuffle=False)
    module = FisherMergeModule(updates["fedfisher"], model=tiny_model())
    trainer = quiet_trainer(tmp_path, max_epochs=-1)
    (before,) = trainer.validate(module, loader, verbose=False)
    trainer.fit(module, val_dataloaders=loader)
    with torch.inference_mode(False):
        again = quiet_trainer(tmp_path, inference_mode=False)
        (after,) = again.validate(module, loader, verbose=False)
    assert after["val_nll"] == module.history[-1]["val_nll"] != before["val_nll"]


def test_validation_that_cannot_be_is_refused_by_name(updates, tmp_path):
    loader = tiny_loader(seed=50, samples=40, shuffle=False)
    for loaders in ([loader, loader], {"one": loader}):
        with pytest.raises(ValueError, match="pass one validation loader"):
            merge(updates["fedfisher"], tmp_path, loaders, model=tiny_model())
    named = [{"x": x, "y": y} for x, y in loader]
    for batches, found in ((named, "dict"), ([x for x, _ in loader], "Tensor")):
        single = DataLoader(batches, batch_size=None)
        with pytest.raises(ValueError, match=rf"must be a pair \(x, y\), got {found}"):
            merge(updates["fedfisher"], tmp_path, single, model=tiny_model())


def test_checkpoints_and_early_stopping_mean_what_they_mean(updates, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "kept", monitor="objective", save_top_k=1)
    stop = EarlyStopping("val_accuracy", mode="max", patience=2)
    loader = tiny_loader(seed=50, samples=40, shuffle=False)
    module = FisherMergeModule(
        updates["fedfisher_kfac"], method="fedfisher_kfac", model=tiny_model(), keep_best=False
    )
    trainer = quiet_trainer(
        tmp_path, max_epochs=-1, callbacks=[checkpoint, stop], enable_checkpointing=True
    )
    with pytest.warns(UserWarning, match="has not converged"):
        trainer.fit(module, val_dataloaders=loader)
    assert stop.stopped_epoch > 0
    saved = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    assert list(saved) == [f"merged.{index}" for index in range(4)]


def test_too_few_epochs_warn(updates, tmp_path):
    with pytest.warns(UserWarning, match="has not converged"):
        merge(
            updates["fedfisher_kfac"], tmp_path, method="fedfisher_kfac", trainer={"max_epochs": 2}
        )


def test_too_few_iterations_warn(updates, tmp_path):
    with pytest.warns(UserWarning, match="has not converged"):
        merge(updates["fedfisher"], tmp_path, max_iterations=1)
    with pytest.raises(ValueError, match="max_iterations"):
        FisherMergeModule(updates["fedfisher"], max_iterations=0)


def test_a_merge_one_iteration_short_warns(updates, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*has not converged")
        whole = merge(updates["fedfisher"], tmp_path)
    needed = int(whole.history[-1]["iterations"])
    with pytest.warns(UserWarning, match="has not converged in . of 4 layers"):
        short = merge(updates["fedfisher"], tmp_path, max_iterations=needed - 1)
    assert short.history[-1]["residual"] < 1e-2
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*has not converged")
        enough = merge(updates["fedfisher"], tmp_path, max_iterations=needed)
    assert_same(enough.merged_state_dict(), whole.merged_state_dict(), rtol=0, atol=0)


def test_validating_before_and_within_a_sweep_does_no_harm(updates, tmp_path):
    loader = tiny_loader(seed=50, samples=40, shuffle=False)
    module = FisherMergeModule(updates["fedfisher"], model=tiny_model())
    trainer = quiet_trainer(tmp_path, max_epochs=-1, val_check_interval=0.5)
    trainer.validate(module, loader, verbose=False)
    assert module.history == []
    trainer.fit(module, val_dataloaders=loader)
    alone = merge(updates["fedfisher"], tmp_path)
    assert_same(module.merged_state_dict(), alone.merged_state_dict(), rtol=0, atol=0)


def test_a_resumed_merge_gives_the_same_model(updates, tmp_path):
    clients = updates["fedfisher_kfac"]
    whole = merge(clients, tmp_path, method="fedfisher_kfac")
    checkpoint = ModelCheckpoint(tmp_path / "kept", save_last=True)
    options = {"callbacks": [checkpoint], "enable_checkpointing": True}
    with pytest.warns(UserWarning, match="has not converged"):
        merge(clients, tmp_path, method="fedfisher_kfac", trainer=options | {"max_epochs": 3})
    module = FisherMergeModule(clients, method="fedfisher_kfac")
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
    first, path = _interrupted(updates[method], tmp_path, stop, **options)
    assert 1 < len(read) < 4
    begun = read.copy()
    read.clear()
    second = _resumed(path, updates[method], tmp_path, **options)
    # The last one begun may not have been solved.
    assert read in ([i for i in order if i not in begun], [i for i in order if i not in begun[:-1]])
    assert_same(second.merged_state_dict(), whole.merged_state_dict(), rtol=0, atol=0)
    assert second.history[:stop] == first.history == whole.history[:stop]
    assert len(second.history) > stop
    assert second.history[-1] == whole.history[-1]


def test_a_solved_merge_resumes_without_reading_a_layer(updates, read, tmp_path):
    first, path = _interrupted(updates["fedfisher"], tmp_path, -1)
    assert sorted(read) == [0, 1, 2, 3]
    read.clear()
    second = _resumed(path, updates["fedfisher"], tmp_path)
    assert read == []
    assert_same(second.merged_state_dict(), first.merged_state_dict(), rtol=0, atol=0)
    assert second.history == [*first.history, first.history[-1]]


def test_a_checkpoint_of_another_merge_is_refused(updates, tmp_path):
    clients = updates["fedfisher"]
    _, path = _interrupted(clients, tmp_path, 1)
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
            _resumed(path, others, tmp_path, method=method)
    _resumed(path, clients, tmp_path)


def _loaded(update):
    model = tiny_model()
    model.load_state_dict(update.parameters)
    return model


@pytest.mark.parametrize("other", [("ekfac", "normalised"), ("kfac", "exact")])
def test_a_checkpoint_of_other_curvature_of_the_same_weights_is_refused(updates, other, tmp_path):
    clients, (kind, fisher) = updates["fedfisher"], other
    _, path = _interrupted(clients, tmp_path, 1)
    others = []
    for client in clients:
        model = _loaded(client)
        extracted = extract_curvature(model, tiny_loader(), kind, fisher=fisher, progress=False)
        header = extracted.header(client.num_samples)
        others.append(ClientUpdate.from_model(model, header, extracted.blocks))
    with pytest.raises(ValueError, match="is of another merge"):
        _resumed(path, others, tmp_path)


def _scaled(block):
    return block.from_tensors({n: 2 * t for n, t in block.tensors().items()}, block.shape)


def test_a_checkpoint_of_curvature_with_other_values_is_refused(updates, tmp_path):
    clients = updates["fedfisher"]
    _, path = _interrupted(clients, tmp_path, 1)
    first, model = clients[0], _loaded(clients[0])
    altered = {**first.blocks, "network.2": _scaled(first.blocks["network.2"])}
    other = ClientUpdate.from_model(model, first.header, altered)
    header = dataclasses.replace(first.header, curvature_samples=first.num_samples + 1)
    recounted = ClientUpdate.from_model(model, header, first.blocks)
    for update in (other, recounted):
        for source in (update, update.save(tmp_path / "other.safetensors")):
            with pytest.raises(ValueError, match="is of another merge"):
                _resumed(path, [source, *clients[1:]], tmp_path)


def test_a_merge_of_updates_in_memory_resumes_from_their_files(updates, read, tmp_path):
    clients = updates["fedfisher"]
    whole, path = _interrupted(clients, tmp_path, -1)
    files = [client.save(tmp_path / f"{k}.safetensors") for k, client in enumerate(clients)]
    noted = dataclasses.replace(clients[0].header, metadata={"note": "a copy"})
    files[0] = ClientUpdate.from_model(_loaded(clients[0]), noted, clients[0].blocks).save(
        tmp_path / "noted.safetensors"
    )
    read.clear()
    second = _resumed(path, files, tmp_path)
    assert read == []
    assert_same(second.merged_state_dict(), whole.merged_state_dict(), rtol=0, atol=0)


def _tempered(power):
    return lambda curvature, head: curvature.power(power)


ROW = dataclasses.replace(METHODS["fedfisher"], name="own", transform=_tempered(0.4))
ROWS = [
    METHODS["fedfisher"],
    ROW,
    dataclasses.replace(ROW, name="another"),
    dataclasses.replace(ROW, client_weight_power=1.0),
    dataclasses.replace(METHODS["fedfisher"], max_influence=2.0),
    dataclasses.replace(METHODS["fedfisher"], steps_per_epoch=1),
]


def test_methods_are_told_apart_by_their_names_and_numbers(updates, tmp_path):
    clients = updates["fedfisher"]
    assert len({fingerprint(row, clients) for row in ROWS}) == len(ROWS)
    _, path = _interrupted(clients, tmp_path, 1, method=ROW)
    with pytest.raises(ValueError, match="is of another merge"):
        _resumed(path, clients, tmp_path, method=ROWS[2])
    _resumed(path, clients, tmp_path, method=dataclasses.replace(ROW, transform=_tempered(0.4)))


@pytest.mark.parametrize("changed", [{"transform": _tempered(0.4)}, {"solver": ConjugateGradient}])
def test_a_method_of_ones_own_needs_a_name_of_its_own(updates, changed):
    own = dataclasses.replace(METHODS["fedfisher"], **changed)
    with pytest.raises(ValueError, match="'fedfisher' needs a name of its own"):
        FisherMergeModule(updates["fedfisher"], method=own)
    named = dataclasses.replace(own, name="own")
    assert FisherMergeModule(updates["fedfisher"], method=named).method == "own"


def test_a_checkpoint_of_something_else_is_refused(updates, tmp_path):
    trainer = quiet_trainer(tmp_path)
    trainer.fit(tiny_model(), tiny_loader())
    trainer.save_checkpoint(tmp_path / "classifier.ckpt")
    module = FisherMergeModule(updates["fedfisher"])
    module.strict_loading = False
    with pytest.raises(ValueError, match="is of another merge"):
        quiet_trainer(tmp_path, max_epochs=-1).fit(module, ckpt_path=tmp_path / "classifier.ckpt")


def test_the_best_iterate_survives_an_interruption(updates, tmp_path):
    clients, options = updates["fedfisher_kfac"], {"method": "fedfisher_kfac"}
    loader = tiny_loader(seed=50, samples=40, shuffle=False)
    first, path = _interrupted(clients, tmp_path, 3, loader, model=tiny_model(), **options)
    best = max(entry["val_accuracy"] for entry in first.history)
    # Labels by which whatever comes later is worse.
    x, _ = loader.dataset.tensors
    worst = tiny_model()
    worst.load_state_dict(first.merged_state_dict())
    wrong = DataLoader(TensorDataset(x, worst(x).argmin(1)), batch_size=8)
    second = _resumed(path, clients, tmp_path, wrong, model=tiny_model(), **options)
    assert len(second.history) == 3 + 20
    assert all(entry["val_accuracy"] < best for entry in second.history[3:])
    assert_same(second.merged_state_dict(), first.merged_state_dict(), rtol=0, atol=0)
    last = merge(clients, tmp_path, **options).merged_state_dict()
    assert any(not torch.equal(last[name], t) for name, t in second.merged_state_dict().items())


@pytest.mark.parametrize("again", [{"max_epochs": 3}, {"max_epochs": -1, "limit_train_batches": 0}])
def test_a_merge_resumed_with_no_sweep_left_ends_as_it_would_have(updates, again, tmp_path):
    clients, options = updates["fedfisher_kfac"], {"method": "fedfisher_kfac"}
    loader = tiny_loader(seed=50, samples=40, shuffle=False)
    x, _ = loader.dataset.tensors
    start = tiny_model()
    start.load_state_dict(FisherMergeModule(clients, **options).merged_state_dict())
    # Labels by which the merge gets worse, so that the best iterate is not the last.
    right = DataLoader(TensorDataset(x, start(x).argmax(1)), batch_size=8)
    first, path = _interrupted(clients, tmp_path, 3, right, model=tiny_model(), **options)
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


def test_a_merge_ends_once(updates, tmp_path):
    with pytest.warns(UserWarning, match="has not converged") as caught:
        merge(updates["fedfisher"], tmp_path, max_iterations=1)
    assert sum("not converged" in str(w.message) for w in caught) == 1


# Memory


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Three clients' updates with each kind of curvature, and the same weights."""
    root = tmp_path_factory.mktemp("kinds")
    return {
        kind: tiny_updates(root / kind, curvature=kind)
        for kind in ("identity", "diagonal", "kfac", "ekfac", "dense")
    }


def _bytes(clients):
    """Of all clients' weights and curvature, by layer."""
    return [
        sum(
            4 * (client.weights(layer).numel() + sum(map(torch.numel, block.tensors().values())))
            for client in clients
            for block in [client.block(layer)]
        )
        for layer in clients[0].layers
    ]


@pytest.fixture
def spills(monkeypatch, tmp_path):
    """Folders of what is kept on disk; they are looked for among the temporary ones."""
    folders, original = [], OnDiskTensors.__init__
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def recording(self, *arguments):
        original(self, *arguments)
        folders.append(Path(self._folder.name))
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
def test_memory_does_not_change_a_bit(kinds, kind, method, spills, tmp_path):
    clients = kinds[kind]
    paths = [client.save(tmp_path / f"{k}.safetensors") for k, client in enumerate(clients)]
    freely = merge(paths, tmp_path, method=method)
    assert spills == []
    sizes = _bytes(clients)
    held = []

    def look(trainer, module, *_):
        held.append([sizes[index] for index in module.merger.solvers])

    for budget in (0, min(sizes), sorted(sizes)[2], max(sizes), sum(sizes) - 1):
        spills.clear()
        held.clear()
        watch = {"callbacks": [LambdaCallback(on_train_batch_end=look)]}
        module = merge(paths, tmp_path, method=method, memory_budget=budget, trainer=watch)
        assert_same(module.merged_state_dict(), freely.merged_state_dict(), rtol=0, atol=0)
        assert module.history[-1] == freely.history[-1]
        spilled = 0 if method == "fedavg" else sum(size > budget for size in sizes)
        # No curvature is left of FedAvg's; what is known of merged layers takes room as well.
        assert spilled <= len(spills) <= spilled + len(clients[0].header.fed_by)
        assert not any(folder.exists() for folder in spills)
        assert all(len(now) <= 1 or sum(now) <= budget for now in held)


def test_layers_wait_for_room(kinds, tmp_path):
    single = dataclasses.replace(METHODS["fedfisher"], steps_per_epoch=1, aligns=False)
    freely = merge(kinds["kfac"], tmp_path, method=single)
    alone = merge(kinds["kfac"], tmp_path, method=single, memory_budget=0)
    # The next layer begins in the sweep in which the one before it is solved.
    assert len(freely.history) > 1
    assert len(alone.history) > len(freely.history)
    assert alone.history[0]["residual"] == 1
    assert freely.history[0]["residual"] < 1
    assert_same(alone.merged_state_dict(), freely.merged_state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["fedfisher_kfac", "fedfisher_diag"])
@pytest.mark.parametrize("labels", [False, True], ids=["alone", "labels"])
def test_memory_does_not_change_published_methods(updates, method, labels, spills, tmp_path):
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
    assert len(spills) == 4
    assert not any(folder.exists() for folder in spills)
    if labels:
        # Labels judge whole models, so all layers move at once.
        assert small.history == freely.history
        assert len(small.history) == 3
    else:
        # The next layer begins in the last sweep of the one before it.
        assert (len(freely.history), len(small.history)) == (3, 4 * (3 - 1) + 1)


@pytest.mark.parametrize("loader", [None, "unused"])
def test_a_model_without_labels_leaves_the_memory_bounded(updates, loader, tmp_path):
    held, val = [], loader and tiny_loader(seed=50, samples=40, shuffle=False)
    watch = LambdaCallback(
        on_train_batch_end=lambda _, module, *__: held.append(len(module.merger.solvers))
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
    assert held
    assert max(held) <= 1


def test_spilled_folders_go_with_a_merge_that_is_stopped(updates, spills, tmp_path):
    with pytest.warns(UserWarning, match="has not converged"):
        merge(
            updates["fedfisher_kfac"],
            tmp_path,
            method="fedfisher_kfac",
            memory_budget=0,
            trainer={"max_epochs": 1},
        )
    assert len(spills) == 1
    assert not spills[0].exists()


@pytest.mark.parametrize("budget", [-1, -(2**40)])
def test_negative_memory_is_refused(updates, budget):
    with pytest.raises(ValueError, match=f"memory_budget must be at least 0 bytes, got {budget}"):
        FisherMergeModule(updates["fedfisher"], memory_budget=budget)
    with pytest.raises(ValueError, match=f"memory_budget must be at least 0 bytes, got {budget}"):
        LayerLoader(updates["fedfisher"], METHODS["fedfisher"], budget)


# A method of one's own, and what is said of layers


def test_a_method_of_ones_own_merges(updates, tmp_path):
    clients = updates["fedfisher"]
    own = MergeMethod(
        "own",
        lambda f, head: Diagonal(f.diagonal()),
        ClosedForm,
        max_iterations=1,
        steps_per_epoch=1,
        curvatures=("kfac",),
    )
    module = merge(clients, tmp_path, method=own)
    reference = _reference_closed_form(clients, 1.0)
    assert_same(module.merged_state_dict(), reference, rtol=2e-4, atol=1e-5)
    assert module.method == "own"
    assert len(module.history) == 1
    with pytest.raises(MergeError, match=r"extract it with .*curvature='kfac'.*'own' needs"):
        FisherMergeModule(updates["fisher_merge"], method=own)


def test_a_warning_names_the_layers_that_are_not_solved(updates, tmp_path):
    def solver(problem):
        solved = problem.average.shape in ((3, 7), (3, 10))
        return (ConjugateGradient if solved else partial(PublishedServer, damping_inside=True))(
            problem
        )

    own = dataclasses.replace(METHODS["fedfisher"], name="own", solver=solver, max_iterations=50)
    with pytest.warns(UserWarning, match="has not converged in 2 of 4 layers") as caught:
        merge(updates["fedfisher"], tmp_path, method=own)
    (message,) = (str(w.message) for w in caught if "not converged" in str(w.message))
    named = re.findall(r"([\w.]+) \(residual (\S+) after (\d+) iterations\)", message)
    assert [(name, count) for name, _, count in named] == [("network.2", "50"), ("network.5", "50")]
    assert all(float(residual) > 1e-3 for _, residual, _ in named)


def test_a_merge_that_is_solved_warns_of_nothing(updates, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*converged")
        for method in METHODS:
            merge(updates[method], tmp_path, method=method, trainer={"max_epochs": -1})


def test_layers_log_their_own_residuals_and_iterations(updates, tmp_path):
    clients, steps = updates["fedfisher_kfac"], 30
    logger = CSVLogger(tmp_path, name="", version="log")
    own = dataclasses.replace(METHODS["fedfisher_kfac"], steps_per_epoch=10, max_iterations=steps)
    module = merge(
        clients, tmp_path, method=own, trainer={"logger": logger, "log_every_n_steps": 1}
    )
    with (tmp_path / "log" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["residual"]]
    assert [float(row["iterations"]) for row in rows] == [10, 20, 30]
    for row, entry in zip(rows, module.history, strict=True):
        for name in ("residual", "iterations"):
            each = [float(row[f"{name}/{layer.name}"]) for layer in module.layers]
            assert float(row[name]) == pytest.approx(max(each), rel=1e-6)
            assert float(row[name]) == pytest.approx(entry[name], rel=1e-6)
    total = sum(client.num_samples for client in clients)
    for layer in module.layers:
        weights = [client.weights(layer).double().flatten() for client in clients]
        terms = [
            (client.num_samples / total, w, oracle.written_out(client.block(layer)))
            for client, w in zip(clients, weights, strict=True)
        ]
        start = sum(p * w for p, w, _ in terms)
        merged = layer.join(module.merged_state_dict()).double().flatten()
        pull = sum(p * (f @ (start - w)).norm() for p, w, f in terms)
        residual = sum(p * f @ (merged - w) for p, w, f in terms).norm() / pull
        logged = float(rows[-1][f"residual/{layer.name}"])
        assert logged == pytest.approx(float(residual), rel=1e-3)
        assert float(rows[-1][f"iterations/{layer.name}"]) == steps


# Every layer against its dense problem


PRECISE = dataclasses.replace(
    METHODS["fedfisher"], name="own", solver=partial(ConjugateGradient, tolerance=1e-8, rcond=1e-3)
)


def _clients_of(make, root, data, **options):
    """Clients that start alike and hold unlike data."""
    torch.manual_seed(0)
    start, clients = make().state_dict(), []
    for client in range(2):
        model = make()
        model.load_state_dict(start)
        callback = FedFisherCallback(root / f"{client}.safetensors", max_samples=None, **options)
        trainer = quiet_trainer(root, max_epochs=3, callbacks=[callback])
        trainer.fit(model, DataLoader(data(client), batch_size=8, shuffle=True))
        clients.append(callback.update)
    return start, clients


class _HeadLast(TinyClassifier):
    def __init__(self):
        super().__init__(learning_rate=0.2)
        self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 3)
        del self.network

    def forward(self, x):
        return self.head(self.body(x).relu())


class _Unaligned(_HeadLast):
    def forward(self, x):
        return self.head(self.body(x).tanh())


class _HeadFirst(_HeadLast):
    def __init__(self):
        super().__init__()
        body = self.body
        del self.body
        self.body = body


def _points(client):
    generator = torch.Generator().manual_seed(client)
    size = 40 + 40 * client
    x = torch.randn(size, 5, generator=generator) + client
    return TensorDataset(x, torch.randint(0, 3, (size,), generator=generator))


HEADS = [
    (_HeadLast, "kfac", True),
    (_HeadFirst, "kfac", True),
    (_HeadLast, "ekfac", True),
    (_HeadFirst, "ekfac", True),
    (_Unaligned, "kfac", False),
    (_HeadLast, "dense", False),
]


@pytest.mark.parametrize(("make", "curvature", "aligned"), HEADS)
def test_an_aligned_layer_that_feeds_a_softmax_is_treated_as_the_head(
    make, curvature, aligned, tmp_path
):
    _, clients = _clients_of(make, tmp_path, _points, curvature=curvature)
    order = ["head", "body"] if make is _HeadFirst else ["body", "head"]
    assert [layer.name for layer in clients[0].layers] == order
    assert clients[0].header.output_layer == "head"
    merged = merge(clients, tmp_path, method=PRECISE).merged_state_dict()
    expected, starts = oracle.fedfisher(clients)
    headless = [_with_header(client, output_layer="") for client in clients]
    others, _ = oracle.fedfisher(headless)
    for layer in clients[0].layers:
        found = layer.join(merged).double()
        move = float((expected[layer.name] - starts[layer.name]).norm())
        assert float((found - expected[layer.name]).norm()) < 0.02 * move
        if layer.name == "head":
            assert (float((found - others["head"]).norm()) > 0.1 * move) == aligned


class _EveryKind(TinyClassifier):
    """Products, a lookup, normalisations, groups, buffers and a frozen layer."""

    def __init__(self):
        super().__init__(learning_rate=0.2)
        del self.network  # or it would stay the first
        self.embedding = nn.Embedding(6, 4)
        self.network = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Conv2d(4, 4, 3, groups=2),
            nn.GroupNorm(2, 4),
            nn.Tanh(),
            nn.Flatten(),
            nn.LayerNorm(16),
            nn.Linear(16, 6).requires_grad_(False),
            nn.Tanh(),
            nn.Linear(6, 3),
        )

    def forward(self, tokens):
        return self.network(self.embedding(tokens).mT.reshape(-1, 4, 4, 4))


def _tokens(client):
    generator = torch.Generator().manual_seed(client)
    size = 48 + 48 * client
    tokens = torch.randint(0, 4 + client, (size, 16), generator=generator)
    return TensorDataset(tokens, torch.randint(0, 3, (size,), generator=generator))


@pytest.mark.parametrize("budget", [0, 2**30])
@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_every_kind_of_layer_is_merged_as_its_dense_problem(curvature, budget, tmp_path):
    start, clients = _clients_of(_EveryKind, tmp_path, _tokens, curvature=curvature)
    product = "kronecker" if curvature == "kfac" else "ekfac"
    assert clients[0].header.kinds == {
        "embedding": f"embedding_{product}",
        "network.0": product,
        "network.1": "diagonal",
        "network.3": "diagonal",
        "network.4": "diagonal",
        "network.7": "diagonal",
        "network.10": product,
    }
    server = _EveryKind()
    server.load_state_dict(start)
    module = merge(clients, tmp_path, method=PRECISE, model=server, memory_budget=budget)
    merged = module.merged_state_dict()
    expected, starts = oracle.fedfisher(clients)
    for layer in clients[0].layers:
        move = float((expected[layer.name] - starts[layer.name]).norm())
        assert move > 1e-3 * float(starts[layer.name].norm())
        assert float((layer.join(merged).double() - expected[layer.name]).norm()) < 0.02 * move
    small, large = (48 / 144, 96 / 144)
    one, two = (client.buffers for client in clients)
    mean = small * one["network.1.running_mean"] + large * two["network.1.running_mean"]
    torch.testing.assert_close(merged["network.1.running_mean"], mean)
    variance = sum(
        p * (b["network.1.running_var"] + (b["network.1.running_mean"] - mean) ** 2)
        for p, b in ((small, one), (large, two))
    )
    torch.testing.assert_close(merged["network.1.running_var"], variance)
    assert merged.keys() == start.keys() - {"network.8.weight", "network.8.bias"}
    for name, tensor in server.state_dict().items():
        assert torch.equal(tensor, merged.get(name, start[name]))


@pytest.mark.parametrize(("slow", "redone"), [(0, [0, 1, 2]), (1, [1, 2]), (2, [2]), (3, [3])])
def test_what_ran_out_of_iterations_is_redone_with_all_that_reads_it(
    kinds, slow, redone, read, tmp_path
):
    clients = kinds["kfac"]
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
        first, path = _interrupted(clients, tmp_path, -1, method=row, max_iterations=200)
        iterations = [state.iterations for state in first.merger.states]
        assert [index for index, steps in enumerate(iterations) if steps >= 200] == [slow]
        read.clear()
        _resumed(path, clients, tmp_path, method=row, max_iterations=200)
        assert read == []
        second = _resumed(path, clients, tmp_path, method=row, max_iterations=240)
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


class WithBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))

    def forward(self, x):
        return self.layers(x)


def _update_of(model, data, kind="diagonal"):
    extracted = extract_curvature(model, DataLoader(data, batch_size=4), kind, progress=False)
    kinds = {name: block.kind for name, block in extracted.blocks.items()}
    header = UpdateHeader(
        len(data), kind, "normalised", "categorical", extracted.num_samples, extracted.layers, kinds
    )
    return ClientUpdate.from_model(model, header, extracted.blocks)


def test_batchnorm_statistics_are_pooled(tmp_path):
    torch.manual_seed(0)
    halves = [torch.randn(40, 4) + shift for shift in (-1.0, 2.0)]
    pooled = torch.cat(halves)
    clients = []
    shared = WithBatchNorm()
    for half in halves:
        model = copy.deepcopy(shared)
        model.layers[1].momentum = None  # cumulative: running statistics of one batch are its own
        model.train()(half)
        model.layers[1].running_var *= (len(half) - 1) / len(half)  # unbiased to biased
        clients.append(_update_of(model, TensorDataset(half, torch.zeros(40, dtype=torch.long))))
    merged = merge(clients, tmp_path, method="fedavg").merged_state_dict()
    hidden = shared.layers[0](pooled)
    torch.testing.assert_close(merged["layers.1.running_mean"], hidden.mean(0))
    torch.testing.assert_close(merged["layers.1.running_var"], hidden.var(0, correction=0))
    assert merged["layers.1.num_batches_tracked"] == 1


def test_a_torchvision_resnet18_goes_through_callback_and_merge(tmp_path):
    class ResNet(TinyClassifier):
        def __init__(self):
            super().__init__()
            self.network = resnet18(num_classes=3)

    torch.manual_seed(0)
    start = ResNet().state_dict()
    updates, models = [], []
    for client in range(2):
        generator = torch.Generator().manual_seed(client)
        x = 2 * torch.randn(6 + 6 * client, 3, 32, 32, generator=generator) + client
        data = TensorDataset(x, torch.arange(len(x)) % 3)
        model = ResNet()
        model.load_state_dict(start)
        callback = FedFisherCallback(tmp_path / f"{client}.safetensors", curvature="diagonal")
        trainer = quiet_trainer(tmp_path, callbacks=[callback])
        trainer.fit(model, DataLoader(data, batch_size=3, shuffle=True))
        updates.append(callback.update)
        models.append(model.network)
    server = ResNet()
    merge(updates, tmp_path, model=server)
    means = [model.bn1.running_mean for model in models]
    variances = [model.bn1.running_var for model in models]
    pooled = (means[0] + 2 * means[1]) / 3
    spread = [v + (m - pooled).square() for m, v in zip(means, variances, strict=True)]
    merged = server.network
    torch.testing.assert_close(merged.bn1.running_mean, pooled)
    torch.testing.assert_close(merged.bn1.running_var, (spread[0] + 2 * spread[1]) / 3)
    assert merged.bn1.num_batches_tracked == models[1].bn1.num_batches_tracked == 4
    assert torch.isfinite(merged.eval()(torch.randn(2, 3, 32, 32))).all()


class _Tied(TinyClassifier):
    """A frozen stem, and two layers that share one weight."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 6).requires_grad_(False),
            nn.Tanh(),
            nn.Linear(6, 6),
            nn.Tanh(),
            nn.Linear(6, 6),
            nn.Tanh(),
            nn.Linear(6, 3),
        )
        self.network[5].weight = self.network[3].weight


def _tied_updates(root, **options):
    torch.manual_seed(0)
    start = _Tied().state_dict()
    updates = []
    for client in range(2):
        model = _Tied()
        model.load_state_dict(start)
        callback = FedFisherCallback(root / f"{client}.safetensors", **options)
        trainer = quiet_trainer(root, max_epochs=3, callbacks=[callback])
        trainer.fit(model, tiny_loader(seed=client))
        updates.append(callback.update)
    return start, updates


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diagonal"])
def test_shared_weights_are_merged_once_and_frozen_ones_not_at_all(curvature, tmp_path):
    start, updates = _tied_updates(tmp_path, curvature=curvature)
    assert not any(name.startswith("network.1.") for name in updates[0].parameters)
    assert "network.5.weight" not in updates[0].parameters
    server = _Tied()
    server.load_state_dict(start)
    module = merge(updates, tmp_path, model=server, val=tiny_loader(seed=5, shuffle=False))
    merged = module.merged_state_dict()
    assert merged.keys() == start.keys() - {"network.1.weight", "network.1.bias"}
    assert torch.equal(merged["network.5.weight"], merged["network.3.weight"])
    assert server.network[5].weight is server.network[3].weight
    assert torch.equal(server.network[3].weight, merged["network.3.weight"])
    assert torch.equal(server.network[1].weight, start["network.1.weight"])
    for client in updates:
        assert not torch.equal(client.parameters["network.3.weight"], merged["network.3.weight"])


def test_frozen_weights_must_be_the_same_everywhere(tmp_path):
    start, updates = _tied_updates(tmp_path)
    with pytest.raises(ValueError, match=r"network\.1\.weight is frozen with digest"):
        FisherMergeModule(updates, model=_Tied())
    other = _Tied()
    other.load_state_dict(start | {"network.1.bias": torch.ones(6)})
    extracted = extract_curvature(other, tiny_loader())
    stranger = ClientUpdate.from_model(other, updates[0].header, extracted.blocks)
    with pytest.raises(MergeError, match=r"network\.1\.bias is frozen with digest"):
        FisherMergeModule([*updates, stranger])


def test_a_module_under_two_names_merges_with_its_buffers(tmp_path):
    class Twice(TinyClassifier):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64))
            self.network = nn.Sequential(self.stem, nn.Linear(64, 3))

        def get_extra_state(self):
            return {"note": 1}

        def set_extra_state(self, state):
            pass

    torch.manual_seed(0)
    start, updates = Twice().state_dict(), []
    for client in range(2):
        model = Twice()
        model.load_state_dict(start)
        callback = FedFisherCallback(tmp_path / f"{client}.safetensors")
        trainer = quiet_trainer(tmp_path, callbacks=[callback])
        trainer.fit(model, tiny_loader(seed=client))
        updates.append(callback.update)
    server = Twice()
    merged = merge(updates, tmp_path, model=server).merged_state_dict()
    assert torch.equal(merged["network.0.1.running_mean"], merged["stem.1.running_mean"])
    assert torch.equal(server.stem[1].running_var, merged["stem.1.running_var"])
    assert merged.keys() == {name for name, t in start.items() if isinstance(t, torch.Tensor)}


def test_layers_treated_unlike_are_refused_by_name(updates):
    first, other = updates["fedfisher"][:2]
    model = tiny_model()
    diagonal = extract_curvature(model, tiny_loader(), "diagonal").blocks
    blocks = {**other.blocks, "network.2": diagonal["network.2"]}
    kinds = {name: block.kind for name, block in blocks.items()}
    header = dataclasses.replace(other.header, kinds=kinds)
    odd = ClientUpdate.from_model(model, header, blocks)
    with pytest.raises(MergeError, match=r"layer network\.2 is diagonal, not kronecker"):
        FisherMergeModule([first, odd])
    FisherMergeModule([first, odd], method="fedavg")


WIRINGS = {
    "no source": ({"network.5": Source("network.2", "relu")}, "the source of network.2 is absent"),
    "another activation": (
        {
            "network.2": Source("network.0", "identity"),
            "network.5": Source("network.2", "relu"),
        },
        "the source of network.2 is network.0 (identity), not network.0 (relu)",
    ),
    "one more": (
        {
            "network.2": Source("network.0", "relu"),
            "network.5": Source("network.2", "relu"),
            "network.7": Source("network.5", "identity"),
        },
        "the source of network.7 is network.5 (identity), not absent",
    ),
}


@pytest.mark.parametrize(("fed_by", "reason"), WIRINGS.values(), ids=WIRINGS)
@pytest.mark.parametrize("method", METHODS)
def test_clients_that_ran_their_layers_otherwise_are_refused(updates, method, fed_by, reason):
    clients = updates[method if method != "fedavg" else "fedfisher"]
    odd = _with_header(clients[1], fed_by=fed_by)
    if method == "fedavg":
        FisherMergeModule([clients[0], odd, clients[2]], method=method)
        return
    with pytest.raises(MergeError, match="ran its layers otherwise") as error:
        FisherMergeModule([clients[0], odd, clients[2]], method=method)
    assert reason in str(error.value)
    assert len(error.value.offenders) == 1
    FisherMergeModule([odd, odd], method=method)


def test_clients_with_other_heads_are_refused(updates):
    first, second, third = updates["fedfisher"]
    none, other = (
        _with_header(second, output_layer=""),
        _with_header(third, output_layer="network.5"),
    )
    with pytest.raises(MergeError) as error:
        FisherMergeModule([first, none, other])
    assert "the output layer is absent, not network.7" in error.value.offenders[0]
    assert "the output layer is network.5, not network.7" in error.value.offenders[1]
    FisherMergeModule([first, none, other], method="fedavg")


@pytest.mark.parametrize("changes", [{"output_layer": ""}, {"fed_by": {}}], ids=str)
def test_a_checkpoint_of_clients_that_ran_otherwise_is_refused(updates, changes, tmp_path):
    clients = updates["fedfisher"]
    _, path = _interrupted(clients, tmp_path, 1)
    with pytest.raises(ValueError, match="is of another merge"):
        _resumed(path, [_with_header(client, **changes) for client in clients], tmp_path)


def test_bad_updates_are_refused_together(updates, tmp_path):
    good, other = updates["fedfisher"][:2]
    truncated = good.save(tmp_path / "truncated.safetensors")
    truncated.write_bytes(truncated.read_bytes()[:-100])
    flipped = good.save(tmp_path / "flipped.safetensors")
    content = bytearray(flipped.read_bytes())
    content[-50] ^= 1
    flipped.write_bytes(content)
    foreign = _update_of(WithBatchNorm(), TensorDataset(torch.randn(9, 4), torch.arange(9) % 3))
    with pytest.raises(MergeError) as error:
        FisherMergeModule(
            [good, truncated, flipped, tmp_path / "missing.safetensors", foreign, other]
        )
    message = str(error.value)
    for part in ("truncated.safetensors", "flipped.safetensors", "digest", "missing.safetensors"):
        assert part in message
    assert "of another model" in message
    assert "layers.0.weight is (5, 4) float32, not absent" in message


def test_no_updates_are_refused():
    with pytest.raises(MergeError, match="there are none"):
        FisherMergeModule([])
    with pytest.raises(MergeError, match="pass a list"):
        FisherMergeModule("updates/client-0.safetensors")
    with pytest.raises(MergeError, match="one update: pass a list"):
        FisherMergeModule(_update_of(nn.Linear(4, 3), _rows()))


def _rows():
    return TensorDataset(torch.randn(9, 4), torch.arange(9) % 3)


@pytest.mark.parametrize("on_disk", [True, False])
def test_other_dtypes_are_another_model(on_disk, tmp_path):
    """Or the first client would decide."""
    models = [nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)) for _ in range(3)]
    models[1][0].running_mean = models[1][0].running_mean.double()
    models[2][1].bias = nn.Parameter(models[2][1].bias.detach().bfloat16())
    header = _update_of(models[0].eval(), _rows(), "kfac").header
    clients = []
    for index, model in enumerate(models):
        blocks = {
            name: Identity(layer.shape) for name, layer in zip("01", header.layers, strict=True)
        }
        plain = dataclasses.replace(
            header, curvature="identity", fisher="", kinds=dict.fromkeys(blocks, "identity")
        )
        clients.append(ClientUpdate.from_model(model, plain, blocks))
        if on_disk:
            clients[-1] = clients[-1].save(tmp_path / f"{index}.safetensors")
    with pytest.raises(MergeError) as error:
        FisherMergeModule(clients, method="fedavg")
    _, one, two = str(error.value).splitlines()
    assert one.endswith("0.running_mean is (4,) float64, not (4,) float32")
    assert two.endswith("1.bias is (3,) bfloat16, not (3,) float32")


def test_methods_refuse_curvature_they_are_not_defined_for(updates):
    with pytest.raises(MergeError, match="fisher='exact'"):
        FisherMergeModule(updates["fedfisher"], method="fedfisher_kfac")
    with pytest.raises(MergeError, match="curvature='diagonal'"):
        FisherMergeModule(updates["fedfisher"], method="fisher_merge")
    mixed = [updates["fedfisher"][0], updates["fedfisher_kfac"][1]]
    with pytest.raises(MergeError, match=r"alike with .*fisher is exact, not normalised"):
        FisherMergeModule(mixed)
    with pytest.raises(ValueError, match="not one of fedavg"):
        FisherMergeModule(updates["fedfisher"], method="fedsgd")


def test_a_model_that_does_not_fit_is_refused(updates):
    with pytest.raises(ValueError, match=r"network\.0\.bias is absent in it"):
        FisherMergeModule(updates["fedfisher"], model=tiny_model(bias=False))


def test_labels_without_a_model_and_half_precision_are_refused(updates, tmp_path):
    with pytest.raises(ValueError, match="needs a model"):
        merge(updates["fedfisher"], tmp_path, tiny_loader())
    for trainer in ({"fast_dev_run": True}, {"limit_train_batches": 2}):
        with pytest.raises(ValueError, match="cuts it short"):
            merge(updates["fedfisher"], tmp_path, trainer=trainer)
    with pytest.raises(ValueError, match="full precision"):
        merge(updates["fedfisher"], tmp_path, trainer={"precision": "bf16-mixed"})


def test_random_state_is_untouched(updates, tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    merge(updates["fedfisher"], tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_layers_are_dealt_by_cost_each_once():
    shapes = [(10, 10), (100, 100), (20, 20), (99, 99), (5, 5)]
    assigned = assign_layers(shapes, 2)
    assert sorted(index for hand in assigned for index in hand) == [0, 1, 2, 3, 4]
    assert assigned == [[1], [4, 0, 2, 3]]
    assert assign_layers(shapes[:1], 3) == [[0], [], []]


def test_only_layers_above_a_rank_s_share_are_prepared_together():
    shapes = [(10, 10), (100, 100), (20, 20), (99, 99), (5, 5)]
    assert [oversized_layers(shapes, ranks) for ranks in (1, 2, 3)] == [{}, {1: 0}, {1: 0, 3: 1}]
    assert oversized_layers(shapes[:1], 1) == {}
    assert oversized_layers(shapes[:1], 3) == {0: 0}


@pytest.mark.parametrize(("ranks", "owner"), [(1, 0), (2, 0), (2, 1), (3, 1), (7, 6)])
def test_every_rank_prepares_its_share_and_the_owner_gets_all_in_order(ranks, owner, monkeypatch):
    sent, made, received = {}, [], []
    curvatures = [Diagonal(torch.full((2, 3), float(client))) for client in range(5)]
    everyone = [rank for rank in range(ranks) if rank != owner] + [owner]
    for rank in everyone:

        def send(objects, destination, rank=rank):
            assert destination == owner
            sent.setdefault(rank, []).extend(objects)

        def receive(objects, source):
            objects[:] = [sent[source].pop(0)]

        def prepare(client, rank=rank):
            made.append((client, rank))
            return Item(client, curvatures[client].tensors())

        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        monkeypatch.setattr("torch.distributed.get_world_size", lambda: ranks)
        monkeypatch.setattr("torch.distributed.send_object_list", send)
        monkeypatch.setattr("torch.distributed.recv_object_list", receive)
        received = list(gather_at_owner(5, owner, prepare, torch.device("cpu")))
        assert rank == owner or not received
    assert sorted(client for client, _ in made) == [0, 1, 2, 3, 4]
    assert len({rank for _, rank in made}) == min(ranks, 5)
    assert not any(sent.values())
    for ours, theirs in zip(received, curvatures, strict=True):
        assert torch.equal(ours.tensors["values"], theirs.values)
    assert [item.label for item in received] == [0, 1, 2, 3, 4]
