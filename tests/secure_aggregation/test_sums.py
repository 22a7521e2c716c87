"""Sums over clients give the merged model, masked and in fixed point as well."""

import dataclasses
from functools import reduce

import pytest
import torch
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

CLIENTS = 4
DIVIDED = ("information", "information_times_weights")


@pytest.fixture(scope="module")
def updates(tmp_path_factory):
    return tiny_updates(tmp_path_factory.mktemp("u"), CLIENTS, curvature="diagonal")


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


def _add(one, other):
    assert one.keys() == other.keys()
    return {name: tensor + other[name] for name, tensor in one.items()}


def _sum(client_sums):
    return reduce(_add, client_sums)


def _merged(updates, folder, method="fisher_merge"):
    module = FisherMergeModule(updates, method=method)
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
    total = _sum(client_sums(update, method) for update in updates)
    _close(
        _model(update_from_sums(total, updates[0])), _merged(updates, tmp_path, method), atol=2e-5
    )


def test_any_curvature_adds_up_to_fedavg(tmp_path):
    updates = tiny_updates(tmp_path)
    total = _sum(client_sums(update, "fedavg") for update in updates)
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
    for name, tensor in _sum(fixed).items():
        assert torch.equal(_sum(sent)[name], tensor), name
    total = from_fixed(_sum(sent))
    _close(
        _model(update_from_sums(total, updates[0], sample_unit=sample_unit)),
        _merged(updates, tmp_path),
        atol=1e-5,
    )
    assert update_from_sums(total, updates[0], sample_unit=sample_unit).num_samples == sum(
        u.num_samples for u in updates
    )


@pytest.mark.parametrize(("fraction_bits", "limbs"), [(20, 1), (40, 1), (20, 3), (40, 2)])
def test_sums_are_off_by_half_a_step_for_each_client(fraction_bits, limbs):
    generator = torch.Generator().manual_seed(0)
    shape = (CLIENTS, 50)
    # Exact in float64, with more bits than are kept, and of either sign.
    numbers = torch.randint(-(2**45), 2**45, shape, generator=generator).double() * 2.0**-44
    faint = torch.randint(-(2**45), 2**45, shape, generator=generator).double() * 2.0**-99
    plain = [{"a": one, "b": other} for one, other in zip(numbers, faint, strict=True)]
    fixed = [to_fixed(tensors, CLIENTS, fraction_bits, limbs, divisors={}) for tensors in plain]
    assert fixed[0]["a"].shape == (limbs, 50)
    total = from_fixed(_sum(fixed), fraction_bits)
    step = 2.0 ** -(fraction_bits * limbs)
    for name, exact in _sum(plain).items():
        assert float((total[name] - exact).abs().max()) <= CLIENTS * step / 2, name


def _scattered(updates, low, high):
    """Information of all sizes, the same for all clients up to a factor."""
    generator = torch.Generator().manual_seed(1)
    changed = [dict(update._tensors) for update in updates]
    for layer in updates[0].layers:
        name = f"curvature/{layer.name}/values"
        size = low + (high - low) * torch.rand(layer.shape, generator=generator)
        for tensors in changed:
            tensors[name] = 10 ** (size + 0.3 * torch.randn(layer.shape, generator=generator))
    return [ClientUpdate(u.header, t) for u, t in zip(updates, changed, strict=True)]


def _quotients(updates):
    """The merge by its definition, matrix by layer name."""
    found = {}
    for layer in updates[0].layers:
        p = [u.num_samples * u.block(layer).values.double() for u in updates]
        pulls = sum(q * u.weights(layer).double() for q, u in zip(p, updates, strict=True))
        found[layer.name] = pulls / sum(p)
    return found


def _in_fixed_point(updates, **options):
    plain = [client_sums(update, sample_unit=1e4) for update in updates]
    sent = [to_fixed(sums, 100, divisors=divisors(sums), **options) for sums in plain]
    total = update_from_sums(from_fixed(_sum(sent)), updates[0], sample_unit=1e4)
    return {layer.name: total.weights(layer).double() for layer in total.layers}


def test_information_of_certain_clients_survives_fixed_point(updates):
    certain = _scattered(updates, -16, 0)
    expected = _quotients(certain)
    for name, found in _in_fixed_point(certain).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("limbs", [1, 2])
def test_what_is_too_faint_for_fixed_point_leaves_weights_among_the_clients(updates, limbs):
    certain = _scattered(updates, -30, 0)
    found = _in_fixed_point(certain, limbs=limbs)
    beyond = 0
    for layer in certain[0].layers:
        weights = torch.stack([update.weights(layer).double() for update in certain])
        least, most = weights.min(0).values, weights.max(0).values
        room = (1 + weights.abs().max(0).values) / 512
        assert (found[layer.name] >= least - room).all(), layer.name
        assert (found[layer.name] <= most + room).all(), layer.name
        beyond += int((found[layer.name] - _quotients(certain)[layer.name] > 1e-3).sum())
    assert beyond  # some were


def test_a_missing_client_leaves_nothing_but_noise(updates):
    plain = [client_sums(update, sample_unit=50.0) for update in updates]
    fixed = [to_fixed(sums, CLIENTS, divisors=divisors(sums)) for sums in plain]
    sent = [_masked(tensors, client, CLIENTS) for client, tensors in enumerate(fixed)]
    total = from_fixed(_sum(sent[1:]))
    assert float(total["weights/network.0"].abs().max()) > 1e4
    # Where the numbers of samples came through, the rest is still no sum of clients.
    total |= {name: torch.tensor(1.0) for name in ("client_weight", "samples")}
    with pytest.raises(UpdateError, match=r"information/network\.0 holds negative values"):
        update_from_sums(total, updates[0])


@pytest.mark.parametrize("method", ["fisher_merge", "fedfisher"])
def test_regions_may_be_summed_before(updates, method, tmp_path):
    sums = [client_sums(update, method) for update in updates]
    regions = [update_from_sums(_sum(pair), updates[0]) for pair in (sums[:1], sums[1:])]
    whole = _model(update_from_sums(_sum(sums), updates[0]))
    _close(_model(update_from_sums(_sum(map(client_sums, regions)), updates[0])), whole, atol=1e-5)
    _close(_merged(regions, tmp_path), whole, atol=1e-5)


def test_buffers_are_merged_alike(normed, tmp_path):
    total = _sum(map(client_sums, normed))
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
    total = _sum(client_sums(update, method) for update in blind)
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


def test_numbers_that_leave_no_room_are_refused(updates):
    total = client_sums(updates[0])
    room = 2.0**63 / 8 / 2.0**40
    total["weights/network.0"] = torch.full((3, 10), room * 1.001)
    total["information_times_weights/network.2"] = torch.full((4, 28), torch.nan)
    with pytest.raises(
        ValueError, match=r"^weights/network\.0, information_times_weights/network\.2 hold numbers"
    ):
        to_fixed(total, 8, divisors=divisors(total))
    total["weights/network.0"] = torch.full((3, 10), -room * 0.999)
    del total["information_times_weights/network.2"]
    fixed = to_fixed(total, 8, divisors=divisors(total))
    back = from_fixed(_sum([fixed] * 8))
    torch.testing.assert_close(back["weights/network.0"], 8 * total["weights/network.0"].double())


@pytest.mark.parametrize("senseless", [{"clients": 0}, {"fraction_bits": 0}, {"limbs": 0}])
def test_senseless_fixed_point_is_refused(updates, senseless):
    with pytest.raises(ValueError, match="must be at least 1"):
        to_fixed(client_sums(updates[0]), **{"clients": 2, "divisors": {}} | senseless)


def test_what_is_not_in_fixed_point_is_refused(updates):
    total = to_fixed(client_sums(updates[0]), 2, divisors={})
    total |= {"client_weight": total["client_weight"].double(), "samples": torch.tensor(1)}
    with pytest.raises(ValueError, match=r"^client_weight, samples are not int64"):
        from_fixed(total)


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
