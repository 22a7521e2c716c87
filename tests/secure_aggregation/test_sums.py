"""Sums over clients give the merged model, masked and in fixed point as well."""

import dataclasses
import math

import pytest
import torch
from helpers.client_sums import CLIENTS, add_up
from helpers.federation import (
    NormedClassifier,
    quiet_trainer,
    tiny_loader,
    tiny_model,
    tiny_updates,
)

from lightning_fedfisher import ClientUpdate, FedFisherCallback, FisherMergeModule, UpdateError
from lightning_fedfisher.curvature import Diagonal
from lightning_fedfisher.secure_aggregation import (
    client_sums,
    divisors,
    from_fixed,
    to_fixed,
    update_from_sums,
)

DIVIDED = ("information", "information_times_weights")


@pytest.fixture(scope="module")
def normed(tmp_path_factory):
    folder, updates = tmp_path_factory.mktemp("n"), []
    torch.manual_seed(0)
    start = NormedClassifier().state_dict()
    for client in range(3):
        model = NormedClassifier()
        model.load_state_dict(start)
        callback = FedFisherCallback(folder / f"{client}.safetensors", curvature="diagonal")
        loader = tiny_loader(client, 20 + 20 * client, shuffle=False)
        quiet_trainer(folder, max_epochs=2, callbacks=[callback]).fit(model, loader)
        updates.append(callback.update)
    return updates


def _merged(updates, folder, method="fisher_merge"):
    # Sums show no client, and so they bound none.
    module = FisherMergeModule(updates, method=method, max_influence=math.inf)
    quiet_trainer(folder, max_epochs=-1).fit(module)
    return module.merged_state_dict()


def _model(update):
    return update.parameters | update.buffers


def _close(one, other, atol=1e-6):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=atol, msg=name)


def _masked(fixed, client, clients):
    """What a client sends: masked by a number that each other client adds or takes away."""
    sent = {name: tensor.clone() for name, tensor in fixed.items()}
    for other in set(range(clients)) - {client}:
        pair = torch.Generator().manual_seed(1000 * min(client, other) + max(client, other))
        for name in sorted(sent):
            mask = torch.randint(-(2**63), 2**63 - 1, sent[name].shape, generator=pair)
            sent[name] += mask if client < other else -mask
    return sent


def test_one_client_returns_itself(updates):
    alone = update_from_sums(client_sums(updates[0]), updates[1])
    for name, tensor in updates[0].parameters.items():
        torch.testing.assert_close(alone.parameters[name], tensor, rtol=1e-6, atol=1e-7)
    for layer in alone.layers:
        expected = updates[0].block(layer).values.double()
        torch.testing.assert_close(alone.block(layer).values, expected)
    assert alone.num_samples == updates[0].num_samples


@pytest.mark.parametrize("method", ["fisher_merge", "fedfisher", "fedavg"])
def test_sums_give_the_merged_model(updates, method, tmp_path):
    total = add_up(client_sums(update, method) for update in updates)
    _close(
        _model(update_from_sums(total, updates[0])), _merged(updates, tmp_path, method), atol=2e-5
    )


def test_any_curvature_adds_up_to_fedavg(tmp_path):
    updates = tiny_updates(tmp_path)
    total = add_up(client_sums(update, "fedavg") for update in updates)
    _close(_model(update_from_sums(total, updates[0])), _merged(updates, tmp_path, "fedavg"))


def test_masked_sums_in_fixed_point_give_the_same_model(updates, tmp_path):
    sample_unit = max(update.num_samples for update in updates)
    plain = [client_sums(update, sample_unit=sample_unit) for update in updates]
    fixed = [to_fixed(tensors, CLIENTS, divisors=divisors(tensors)) for tensors in plain]
    sent = [_masked(tensors, client, CLIENTS) for client, tensors in enumerate(fixed)]
    for tensors, masked in zip(fixed, sent, strict=True):
        hidden = torch.cat([tensor.flatten() for tensor in masked.values()]).double()
        assert not any(torch.equal(masked[n], t) for n, t in tensors.items() if t.any())
        # Uniform on the ring: its spread is known.
        assert float(hidden.std()) == pytest.approx(2**64 / 12**0.5, rel=0.05)
    for name, tensor in add_up(fixed).items():
        assert torch.equal(add_up(sent)[name], tensor), name
    total = from_fixed(add_up(sent))
    _close(
        _model(update_from_sums(total, updates[0], sample_unit=sample_unit)),
        _merged(updates, tmp_path),
        atol=1e-5,
    )
    assert update_from_sums(total, updates[0], sample_unit=sample_unit).num_samples == sum(
        u.num_samples for u in updates
    )


def test_a_missing_client_leaves_nothing_but_noise(updates):
    plain = [client_sums(update, sample_unit=50.0) for update in updates]
    fixed = [to_fixed(sums, CLIENTS, divisors=divisors(sums)) for sums in plain]
    sent = [_masked(tensors, client, CLIENTS) for client, tensors in enumerate(fixed)]
    total = from_fixed(add_up(sent[1:]))
    assert float(total["weights/network.0"].abs().max()) > 1e4
    # Where the numbers of samples came through, the rest is still no sum of clients.
    total |= {name: torch.tensor(1.0) for name in ("client_weight", "samples")}
    with pytest.raises(UpdateError, match=r"information/network\.0 holds negative values"):
        update_from_sums(total, updates[0])


@pytest.mark.parametrize("method", ["fisher_merge", "fedfisher"])
def test_regions_may_be_summed_before(updates, method, tmp_path):
    sums = [client_sums(update, method) for update in updates]
    regions = [update_from_sums(add_up(pair), updates[0]) for pair in (sums[:1], sums[1:])]
    whole = _model(update_from_sums(add_up(sums), updates[0]))
    _close(
        _model(update_from_sums(add_up(map(client_sums, regions)), updates[0])), whole, atol=1e-5
    )
    _close(_merged(regions, tmp_path), whole, atol=1e-5)


def test_buffers_are_merged_alike(normed, tmp_path):
    total = add_up(map(client_sums, normed))
    found = update_from_sums(total, normed[0]).buffers
    merged = FisherMergeModule(normed, method="fisher_merge").merged_state_dict()
    counter = "network.3.0.num_batches_tracked"
    for name in found.keys() - {counter}:
        torch.testing.assert_close(found[name], merged[name], rtol=1e-5, atol=1e-6)
    counts = torch.tensor([float(update.buffers[counter]) for update in normed])
    samples = torch.tensor([float(update.num_samples) for update in normed])
    assert len(set(counts.tolist())) == 3
    assert found[counter] == (counts * samples).sum().div(samples.sum()).round().long()
    assert found[counter].dtype == torch.int64
    for mean, whole in ((2.4, 2), (2.6, 3)):
        changed = total | {f"buffers/{counter}": mean * total["samples"]}
        assert update_from_sums(changed, normed[0]).buffers[counter] == whole


@pytest.mark.parametrize(("method", "power"), [("fisher_merge", 1.0), ("fedfisher", 0.5)])
def test_entries_without_information_are_averages(updates, method, power):
    blind = []
    for update in updates:
        values = dict(update.blocks)
        some = values["network.5"].values.clone()
        some[2] = 0
        values["network.5"] = Diagonal(some)
        model = tiny_model()
        model.load_state_dict(update.parameters)
        blind.append(ClientUpdate.from_model(model, update.header, values))
    total = add_up(client_sums(update, method) for update in blind)
    merged = update_from_sums(total, blind[0]).parameters["network.5.weight"]
    samples = [update.num_samples**power for update in blind]
    average = sum(
        n * u.parameters["network.5.weight"] for n, u in zip(samples, blind, strict=True)
    ) / sum(samples)
    torch.testing.assert_close(merged[2], average[2])
    assert not torch.allclose(merged[1], average[1])


def test_curvature_that_is_not_diagonal_is_refused(tmp_path):
    (update,) = tiny_updates(tmp_path, 1, 1)
    with pytest.raises(UpdateError, match="curvature='diagonal'"):
        client_sums(update)
    with pytest.raises(UpdateError) as error:
        client_sums(update, "fedfisher")
    assert len(error.value.offenders) == len(update.layers)
    assert "network.0 has kronecker curvature, not diagonal" in error.value.offenders[0]


def test_sums_that_do_not_fit_are_refused(updates):
    total = client_sums(updates[0])
    odd = dict(total)
    del odd["information_times_weights/network.0"]
    odd |= {"more": torch.ones(1), "weights/network.2": torch.ones(2)}
    odd["information/network.5"] = total["information/network.5"].clone()
    odd["information/network.5"][0, 0] = -1.0
    odd["client_weight"] = torch.tensor(torch.nan)
    with pytest.raises(UpdateError) as error:
        update_from_sums(odd, updates[0])
    assert [line.split()[0] for line in error.value.offenders] == [
        "client_weight",
        "information/network.5",
        "information_times_weights/network.0",
        "more",
        "weights/network.2",
    ]
    assert "holds negative values, down to -1" in error.value.offenders[1]
    assert "1 values that are not finite" in error.value.offenders[0]
    with pytest.raises(UpdateError, match="samples must be greater than 0"):
        update_from_sums(total | {"samples": torch.tensor(0.0)}, updates[0])
    with pytest.raises(ValueError, match="sample_unit"):
        client_sums(updates[0], sample_unit=0)


def test_nothing_private_is_pooled(updates):
    told = dataclasses.replace(updates[0].header, metadata={"who": "me"})
    like = ClientUpdate(told, updates[0]._tensors)
    found = update_from_sums(client_sums(updates[1]), like)
    assert found.header.metadata == {}
    assert found.header.curvature_samples == 0
    nameless = {name: torch.zeros_like(tensor) for name, tensor in updates[0]._tensors.items()}
    other = update_from_sums(client_sums(updates[1]), ClientUpdate(updates[2].header, nameless))
    assert other.digest == found.digest


def test_information_divides_and_nothing_else(updates):
    layers = [layer.name for layer in updates[0].layers]
    expected = {f"{group}/{n}": f"information/{n}" for n in layers for group in DIVIDED}
    assert divisors(client_sums(updates[0])) == expected
