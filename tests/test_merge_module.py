"""FisherMergeModule: the merge on a Trainer, its closed cases, its refusals and its manners."""

import copy
import csv
import dataclasses
import math
import re
import warnings
from functools import partial

import pytest
import torch
from helpers.federation import quiet_trainer, tiny_data, tiny_loader, tiny_model
from helpers.merging import (
    OF_NETWORKS,
    assert_same,
    merge,
    update_of,
    updates_by_method,
    with_header,
)
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from oracles import merge as oracle
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher import (
    METHODS,
    ClientUpdate,
    FisherMergeModule,
    MergeError,
    extract_curvature,
)
from lightning_fedfisher.curvature.base import Identity
from lightning_fedfisher.curvature.diagonal import Diagonal
from lightning_fedfisher.layers import Source
from lightning_fedfisher.merge.methods import MergeMethod
from lightning_fedfisher.merge.solvers import ClosedForm, ConjugateGradient, PublishedServer


@pytest.fixture(scope="module")
def updates(tmp_path_factory):
    """Three clients' updates for each method."""
    return updates_by_method(tmp_path_factory.mktemp("updates"))


# To the bit, but for what is carried over by maps that are the identity up to rounding.
EXACT = {m: 1e-6 if row.aligns else 0.0 for m, row in METHODS.items()}


@pytest.mark.parametrize("method", OF_NETWORKS)
def test_one_client_is_returned(updates, method, tmp_path):
    client, error = updates[method][0], EXACT[method]
    module = merge([client], tmp_path, method=method)
    assert_same(module.merged_state_dict(), client.parameters, rtol=error, atol=error)


@pytest.mark.parametrize("method", OF_NETWORKS)
def test_identical_clients_are_returned(updates, method, tmp_path):
    client, error = updates[method][1], EXACT[method]
    module = merge([client] * 3, tmp_path, method=method, allow_duplicates=True)
    assert_same(module.merged_state_dict(), client.parameters, rtol=error, atol=error)


@pytest.mark.parametrize("method", OF_NETWORKS)
def test_distances_to_the_clients_add_up_to_the_objective(updates, method, tmp_path):
    module = merge(updates[method], tmp_path, method=method, max_influence=math.inf)
    assert module.distances.shape == (len(module.layers), 3)
    assert module.distances.all()
    client_weights = torch.tensor(
        [client.weight for client in module.result.clients], dtype=torch.float64
    )
    objective = float((module.distances.square() @ client_weights).sum())
    assert objective == pytest.approx(module.history[-1]["objective"], rel=1e-5)


def test_a_client_that_is_returned_is_at_no_distance(updates, tmp_path):
    assert not merge(
        [updates["fedavg"][0]] * 2, tmp_path, method="fedavg", allow_duplicates=True
    ).distances.any()


def test_fedavg_is_the_weighted_average_and_takes_any_update(updates, tmp_path):
    for kind in ("fedavg", "fedfisher"):
        clients = updates[kind]
        merged = merge(clients, tmp_path, method="fedavg").merged_state_dict()
        total = sum(client.num_samples for client in clients)
        for name in merged:
            average = sum(c.num_samples / total * c.parameters[name] for c in clients)
            torch.testing.assert_close(merged[name], average)


def _reference_closed_form(clients, power, client_weight_power=1.0):
    client_weights = [client.num_samples**client_weight_power for client in clients]
    merged = {}
    for layer in clients[0].layers:
        above, below = 0, 0
        for client_weight, client in zip(client_weights, clients, strict=True):
            f = client_weight * client.block(layer).diagonal().double().pow(power)
            above, below = above + f * client.weights(layer).double(), below + f
        terms = zip(client_weights, clients, strict=True)
        average = sum(n / sum(client_weights) * c.weights(layer).double() for n, c in terms)
        matrix = torch.where(below > 0, above / below, average)
        merged |= layer.split(matrix.float())
    return merged


@pytest.mark.parametrize(("method", "power"), [("fisher_merge", 1.0), ("fedfisher", 0.5)])
def test_diagonal_curvature_gives_the_closed_form(updates, method, power, tmp_path):
    clients = updates["fisher_merge"]
    module = merge(clients, tmp_path, method=method, max_influence=math.inf)
    reference = _reference_closed_form(clients, power, METHODS[method].client_weight_power)
    assert_same(module.merged_state_dict(), reference, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("method", OF_NETWORKS)
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
    options = {"method": "fedfisher_kfac", "max_iterations": 600}
    last = merge(clients, tmp_path, loader, model=tiny_model(), keep_best=False, **options)
    alone = merge(clients, tmp_path, **options)
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
        clients.append(update_of(model.eval(), data))
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
    # Lightning logs in float32.
    assert after["val_nll"] == pytest.approx(module.history[-1]["val_nll"], rel=1e-6)
    assert after["val_nll"] != before["val_nll"]


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


def test_validating_before_and_within_an_epoch_does_no_harm(updates, tmp_path):
    loader = tiny_loader(seed=50, samples=40, shuffle=False)
    module = FisherMergeModule(updates["fedfisher"], model=tiny_model())
    trainer = quiet_trainer(tmp_path, max_epochs=-1, val_check_interval=0.5)
    trainer.validate(module, loader, verbose=False)
    assert module.history == []
    trainer.fit(module, val_dataloaders=loader)
    alone = merge(updates["fedfisher"], tmp_path)
    assert_same(module.merged_state_dict(), alone.merged_state_dict(), rtol=0, atol=0)


def _tempered(power):
    return lambda curvature: curvature.power(power)


@pytest.mark.parametrize("changed", [{"transform": _tempered(0.4)}, {"solver": ConjugateGradient}])
def test_a_method_of_ones_own_needs_a_name_of_its_own(updates, changed):
    own = dataclasses.replace(METHODS["fedfisher"], **changed)
    with pytest.raises(ValueError, match="'fedfisher' needs a name of its own"):
        FisherMergeModule(updates["fedfisher"], method=own)
    named = dataclasses.replace(own, name="own")
    assert FisherMergeModule(updates["fedfisher"], method=named).method == "own"


def test_a_merge_ends_once(updates, tmp_path):
    with pytest.warns(UserWarning, match="has not converged") as caught:
        merge(updates["fedfisher"], tmp_path, max_iterations=1)
    assert sum("not converged" in str(w.message) for w in caught) == 1


# A method of one's own, and what is said of layers


def test_a_method_of_ones_own_merges(updates, tmp_path):
    clients = updates["fedfisher"]
    own = MergeMethod(
        "own",
        ClosedForm,
        max_iterations=1,
        steps_per_epoch=1,
        transform=lambda f: Diagonal(f.diagonal()),
        curvatures=("kfac",),
    )
    module = merge(clients, tmp_path, method=own)
    reference = _reference_closed_form(clients, 1.0)
    assert_same(module.merged_state_dict(), reference, rtol=2e-4, atol=1e-5)
    assert module.method == "own"
    assert len(module.history) == 1
    with pytest.raises(MergeError, match=r"extract it with .*curvature='kfac'.*method 'own'"):
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
        for method in OF_NETWORKS:
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
        gradients = sum(p * (f @ (start - w)).norm() for p, w, f in terms)
        residual = sum(p * f @ (merged - w) for p, w, f in terms).norm() / gradients
        logged = float(rows[-1][f"residual/{layer.name}"])
        assert logged == pytest.approx(float(residual), rel=1e-3)
        assert float(rows[-1][f"iterations/{layer.name}"]) == steps


class WithBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))

    def forward(self, x):
        return self.layers(x)


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
        clients.append(update_of(model, TensorDataset(half, torch.zeros(40, dtype=torch.long))))
    merged = merge(clients, tmp_path, method="fedavg").merged_state_dict()
    hidden = shared.layers[0](pooled)
    torch.testing.assert_close(merged["layers.1.running_mean"], hidden.mean(0))
    torch.testing.assert_close(merged["layers.1.running_var"], hidden.var(0, correction=0))
    assert merged["layers.1.num_batches_tracked"] == 1


# Refusals


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
@pytest.mark.parametrize("method", OF_NETWORKS)
def test_clients_that_ran_their_layers_otherwise_are_refused(updates, method, fed_by, reason):
    clients = updates[method if method != "fedavg" else "fedfisher"]
    odd = with_header(clients[1], fed_by=fed_by)
    if method == "fedavg":
        FisherMergeModule([clients[0], odd, clients[2]], method=method)
        return
    with pytest.raises(MergeError, match="ran its layers otherwise") as error:
        FisherMergeModule([clients[0], odd, clients[2]], method=method)
    assert reason in str(error.value)
    assert len(error.value.offenders) == 1
    FisherMergeModule([odd, odd], method=method)


def test_clients_with_other_output_layers_are_refused(updates):
    first, second, third = updates["fedfisher"]
    none, other = (
        with_header(second, output_layer=""),
        with_header(third, output_layer="network.5"),
    )
    with pytest.raises(MergeError) as error:
        FisherMergeModule([first, none, other])
    assert "the output layer is absent, not network.7" in error.value.offenders[0]
    assert "the output layer is network.5, not network.7" in error.value.offenders[1]
    FisherMergeModule([first, none, other], method="fedavg")


def test_bad_updates_are_refused_together(updates, tmp_path):
    good, other = updates["fedfisher"][:2]
    truncated = good.save(tmp_path / "truncated.safetensors")
    truncated.write_bytes(truncated.read_bytes()[:-100])
    flipped = good.save(tmp_path / "flipped.safetensors")
    content = bytearray(flipped.read_bytes())
    content[-50] ^= 1
    flipped.write_bytes(content)
    foreign = update_of(WithBatchNorm(), TensorDataset(torch.randn(9, 4), torch.arange(9) % 3))
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
        FisherMergeModule(update_of(nn.Linear(4, 3), _rows()))


def _rows():
    return TensorDataset(torch.randn(9, 4), torch.arange(9) % 3)


@pytest.mark.parametrize("on_disk", [True, False])
def test_other_dtypes_are_another_model(on_disk, tmp_path):
    """Or the first client would decide."""
    models = [nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)) for _ in range(3)]
    models[1][0].running_mean = models[1][0].running_mean.double()
    models[2][1].bias = nn.Parameter(models[2][1].bias.detach().bfloat16())
    header = update_of(models[0].eval(), _rows(), "kfac").header
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


def test_weights_that_are_assigned_are_the_merged_ones(updates, tmp_path):
    module = merge(updates["fedavg"], tmp_path, method="fedavg")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in module.state_dict().items()}
    module.load_state_dict(zeros, assign=True)
    assert not any(tensor.any() for tensor in module.merged_state_dict().values())
    quiet_trainer(tmp_path, max_epochs=-1).fit(module)
    for layer, matrix in zip(module.layers, module.merged, strict=True):
        assert torch.equal(layer.join(module.merged_state_dict()), matrix)


def test_updates_are_hashed_once_for_all_checkpoints(updates, tmp_path, monkeypatch):
    hashed, original = [], ClientUpdate.digests.fget
    monkeypatch.setattr(
        ClientUpdate, "digests", property(lambda u: (hashed.append(u), original(u))[1])
    )
    module = FisherMergeModule(updates["fedavg"], method="fedavg")
    for _ in range(3):
        module.on_save_checkpoint({})
    assert len(hashed) == len(updates["fedavg"])
