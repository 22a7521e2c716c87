"""merge_updates: the server's whole work without a Trainer, equal to the module's to the bit."""

import subprocess
import sys
import time
import warnings
from dataclasses import replace

import pytest
import torch
from helpers.federation import quiet_trainer, tiny_loader, tiny_model
from helpers.merging import (
    OF_NETWORKS,
    merge,
    small_classifier,
    small_data,
    update_of,
    updates_by_method,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher.errors import MergeError
from lightning_fedfisher.extraction.extract import extract_curvature
from lightning_fedfisher.merge.merger import Merger
from lightning_fedfisher.merge.methods import METHODS
from lightning_fedfisher.merge.objective import average
from lightning_fedfisher.merge.options import MergeOptions
from lightning_fedfisher.merge.without_trainer import merge_updates
from lightning_fedfisher.merge_module import FisherMergeModule
from lightning_fedfisher.update.client_update import ClientUpdate


@pytest.fixture(scope="module")
def updates(tmp_path_factory):
    """Three clients' updates for each method."""
    return updates_by_method(tmp_path_factory.mktemp("updates"))


def assert_equal(result, module):
    """Everything that the function tells is what the module tells, to the bit."""
    state = module.merged_state_dict()
    assert result.state_dict.keys() == state.keys()
    for name, tensor in result.state_dict.items():
        assert torch.equal(tensor, state[name]), name
    assert list(result.history) == module.history
    assert torch.equal(result.distances, module.distances)
    assert torch.equal(result.influence, module.influence)
    assert result.layers == module.result.layers
    assert result.clients == module.result.clients
    assert result.server_labels == module.server_labels


@pytest.mark.parametrize("budget", [0, 2**30])
@pytest.mark.parametrize("method", OF_NETWORKS)
def test_the_function_and_the_module_give_the_same_merge(updates, method, budget, tmp_path):
    clients, options = updates[method], {"method": method, "memory_budget": budget}
    options["max_iterations"] = 300
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*has not converged")
        assert_equal(merge_updates(clients, **options), merge(clients, tmp_path, **options))


def test_the_best_iterate_on_labels_is_the_modules(updates, tmp_path):
    clients, loader = updates["fedfisher_kfac"], tiny_loader(seed=50, samples=40, shuffle=False)
    options = {"method": "fedfisher_kfac", "model": tiny_model(), "max_iterations": 600}
    result = merge_updates(clients, validation_loader=loader, **options)
    assert result.server_labels == 40
    best = max(entry["val_accuracy"] for entry in result.history)
    model = tiny_model().eval()
    model.load_state_dict(result.state_dict)
    x, y = loader.dataset.tensors
    assert 100 * float((model(x).argmax(1) == y).float().mean()) == pytest.approx(best)
    assert_equal(result, merge(clients, tmp_path, loader, **options))
    last = merge_updates(clients, validation_loader=loader, keep_best=False, **options)
    assert last.server_labels == 0
    assert last.history == result.history


def test_a_model_is_checked_and_not_changed(updates):
    model = tiny_model(seed=9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merge_updates(updates["fedfisher"], model=model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="the model does not fit the updates"):
        merge_updates(updates["fedfisher"], model=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="needs a model to run"):
        merge_updates(updates["fedfisher"], validation_loader=tiny_loader())


def test_the_result_tells_what_each_layer_and_client_did(updates):
    clients = updates["fedfisher"]
    result = merge_updates(clients, max_influence=10)
    assert result.method == "fedfisher"
    assert result.solved
    assert result.warnings == ()
    assert [layer.name for layer in result.layers] == [layer.name for layer in clients[0].layers]
    assert all(layer.residual < 1e-3 and layer.iterations > 0 for layer in result.layers)
    total = sum(layer.objective for layer in result.layers)
    assert total == pytest.approx(result.history[-1]["objective"])
    roots = torch.tensor([client.num_samples for client in clients]).double().sqrt()
    weights = torch.tensor([client.weight for client in result.clients], dtype=torch.float64)
    torch.testing.assert_close(weights, roots / roots.sum())
    assert [client.digest for client in result.clients] == [client.digest for client in clients]
    assert result.influence.shape == (4, 3, 3)
    assert result.distances.shape == (4, 3)
    assert result.model_fingerprint == clients[0].model_fingerprint


def test_what_has_not_begun_is_the_average_once_somebody_looks(updates, monkeypatch):
    reads, original = [], ClientUpdate.weights
    monkeypatch.setattr(
        ClientUpdate, "weights", lambda u, layer: (reads.append(layer.name), original(u, layer))[1]
    )
    clients = updates["fedfisher"]
    merger = Merger.open(clients, MergeOptions(), tiny_model())
    assert reads == []
    first, *others = (layer.name for layer in merger.layers)
    merger.advance(0)
    merger.finish_epoch()
    assert reads == [first] * 3
    state = merger.state_dict()
    assert sorted(reads[3:]) == sorted(others * 3)
    roots = [client.num_samples**0.5 for client in clients]
    for index, layer in enumerate(merger.layers):
        expected = average(roots, [original(client, layer) for client in clients])
        assert torch.equal(layer.join(state), expected) == (index > 0), layer.name
    reads.clear()
    for name, tensor in merger.state_dict().items():
        assert torch.equal(tensor, state[name])
    merger.advance(0)
    merger.finish_epoch()
    assert reads == []


def test_a_module_holds_the_average_for_whoever_takes_its_state(updates):
    module = FisherMergeModule(updates["fedfisher"])
    taken = module.state_dict()
    expected = FisherMergeModule(updates["fedfisher"]).merged_state_dict()
    for index, layer in enumerate(module.layers):
        assert torch.equal(taken[f"merged.{index}"], layer.join(expected))
    other = FisherMergeModule(updates["fedfisher"])
    other.load_state_dict({name: tensor + 1 for name, tensor in taken.items()})
    for index, layer in enumerate(module.layers):
        found = layer.join(other.merged_state_dict())
        assert torch.equal(found, taken[f"merged.{index}"] + 1)


def test_the_result_tells_the_precision_of_each_layer(updates):
    result = merge_updates(updates["fedfisher"])
    assert [layer.bits for layer in result.layers] == [32] * 4
    _, double = _trained("gaussian", 0)
    assert [layer.bits for layer in merge_updates([double]).layers] == [64]


def test_a_merge_that_is_not_solved_says_so(updates):
    with pytest.warns(UserWarning, match="has not converged in"):
        result = merge_updates(updates["fedfisher"], max_iterations=1)
    assert not result.solved
    assert any("has not converged" in warning for warning in result.warnings)


_HOSTILE = "a\x1b[2J\u202e\nerror: b"


def _of_a_stranger(seed, key=_HOSTILE, scale=1.0):
    """An update whose layer, source and metadata are named by a stranger."""
    net = nn.Sequential(small_classifier(seed=seed))
    net.add_module(key, nn.Linear(3, 3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= scale
    update = update_of(net, small_data(seed), "kfac")
    update.source = f"{seed}{_HOSTILE}.safetensors"
    return update


def test_a_strangers_names_do_nothing_to_a_terminal():
    clients = [_of_a_stranger(seed, scale=30.0 if seed == 3 else 1.0) for seed in range(4)]
    with pytest.warns(UserWarning, match="has not converged in") as told:
        result = merge_updates(clients, max_iterations=1)
    texts = [str(warning.message) for warning in told] + list(result.warnings)
    assert any(_HOSTILE.encode("unicode_escape").decode() in text for text in texts)
    texts += [client.name for client in result.clients]
    for others in ([_of_a_stranger(5, key="c\x9b\nerror: d")], [_of_a_stranger(6, key="e")] * 2):
        with pytest.raises(MergeError) as refused:
            merge_updates([clients[0], *others])
        texts.append(str(refused.value))
        with pytest.raises(ValueError, match="does not fit") as refused:
            merge_updates(others, model=nn.Sequential(small_classifier()))
        texts.append(str(refused.value))
    for text in texts:
        assert all(line.isprintable() for line in text.split("\n")), text
        assert not any(line.startswith("error") for line in text.split("\n")), text


def test_options_out_of_range_are_refused(updates):
    clients = updates["fedfisher"]
    for options, reason in (
        ({"method": "magic"}, "method 'magic' is not one of fedavg"),
        ({"max_iterations": 0}, "max_iterations must be at least 1"),
        ({"max_influence": 0.5}, "max_influence must be at least 1"),
        ({"memory_budget": -1}, "memory_budget must be at least 0"),
    ):
        with pytest.raises(ValueError, match=reason):
            merge_updates(clients, **options)
    with pytest.raises(MergeError, match="there are none"):
        merge_updates([])


def test_a_method_of_ones_own_is_a_row(updates):
    own = replace(METHODS["fedfisher"], name="own", transform=lambda f: f.power(1.0))
    assert merge_updates(updates["fedfisher"], method=own).method == "own"


def test_nothing_global_changes(updates):
    state, grad = torch.get_rng_state(), torch.is_grad_enabled()
    merge_updates(updates["fedfisher"])
    assert torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled() == grad


def test_merging_needs_no_lightning():
    script = (
        "import sys, lightning_fedfisher.merge.merger\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('lightning', 'torchvision')]"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# The clients' likelihood decides what validation means


def _regression(likelihood, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    outputs = x @ torch.arange(8.0).double().view(4, 2) / 4
    y = (outputs > 0).double() if likelihood == "bernoulli" else outputs
    return TensorDataset(x, y)


def _trained(likelihood, client):
    data = _regression(likelihood, client)
    x, y = data.tensors
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(4, 2).double()
    loss = nn.BCEWithLogitsLoss() if likelihood == "bernoulli" else nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for _ in range(30):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    extracted = extract_curvature(
        model, DataLoader(data, 10), "kfac", likelihood=likelihood, progress=False
    )
    return model, ClientUpdate.from_model(model, extracted.header(), extracted.blocks)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_validation_scores_by_the_clients_likelihood(likelihood, tmp_path):
    clients = [_trained(likelihood, client) for client in range(2)]
    model, held_out = clients[0][0], _regression(likelihood, 9)
    loader = DataLoader(held_out, 7)
    result = merge_updates([update for _, update in clients], model=model, validation_loader=loader)
    model.load_state_dict(result.state_dict)
    x, y = held_out.tensors
    with torch.no_grad():
        outputs = model(x)
    last = result.history[-1]
    if likelihood == "gaussian":
        # A Gaussian of unit variance; nothing is right or wrong about a number.
        expected = -torch.distributions.Normal(outputs, 1.0).log_prob(y).sum(1).mean()
        assert "val_accuracy" not in last
    else:
        logs = torch.distributions.Bernoulli(logits=outputs).log_prob(y)
        expected = -logs.sum(1).mean()
        right = 100 * ((outputs > 0) == (y > 0.5)).double().mean()
        assert last["val_accuracy"] == pytest.approx(float(right), abs=1e-4)
        assert last["val_accuracy"] > 80
    assert last["val_nll"] == pytest.approx(float(expected), rel=1e-5)
    module = FisherMergeModule([update for _, update in clients], model=model)
    quiet_trainer(tmp_path, max_epochs=-1).fit(module, val_dataloaders=loader)
    assert module.history == list(result.history)


def test_labels_that_cannot_be_the_likelihoods_are_refused():
    model, update = _trained("gaussian", 0)
    x, y = _regression("gaussian", 9).tensors
    wrong = DataLoader(TensorDataset(x, y[:, :1]), 8)
    with pytest.raises(ValueError, match="labels"):
        merge_updates([update], model=model, validation_loader=wrong)


def test_validation_that_cannot_be_repeated_is_refused():
    model, update = _trained("gaussian", 0)
    batch = _regression("gaussian", 9).tensors
    with pytest.raises(ValueError, match="one pass an epoch: pass a DataLoader or a list"):
        merge_updates([update], model=model, validation_loader=iter([batch]))
    with pytest.raises(ValueError, match="gives no samples"):
        merge_updates([update], model=model, validation_loader=[])


def test_what_costs_nothing_is_refused_before_anything_is_read():
    with pytest.raises(ValueError, match="needs a model to run"):
        merge_updates(["missing"], validation_loader=[])
    with pytest.raises(RuntimeError, match="device"):
        merge_updates(["missing"], device="nonsense")
    with pytest.raises(ValueError, match="method None is not one of"):
        merge_updates(["missing"], method=None)


def test_advice_speaks_of_what_there_is(updates):
    with pytest.warns(UserWarning, match="Raise max_iterations") as caught:
        merge_updates(updates["fedfisher"], max_iterations=1)
    assert not any("Trainer" in str(warning.message) for warning in caught)


def test_the_time_is_that_of_the_merge(updates, monkeypatch):
    original = ClientUpdate.verify
    monkeypatch.setattr(
        ClientUpdate, "verify", lambda u, **how: (time.sleep(0.5), original(u, **how))
    )
    started = time.perf_counter()
    result = merge_updates(updates["fedavg"], method="fedavg")
    assert 0 < result.seconds < time.perf_counter() - started - 0.5 * len(result.clients)
