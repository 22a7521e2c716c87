"""BatchNorm statistics and counters: merged by their own laws, and bounded like the layers."""

import itertools
import math
import weakref

import pytest
import torch
from torch import nn

from lightning_fedfisher import ClientUpdate, FisherMergeModule
from lightning_fedfisher.curvature.base import Identity
from lightning_fedfisher.layers import find_layers
from lightning_fedfisher.merge.buffers import describe_mixed_statistics, merge_buffers
from lightning_fedfisher.merge.influence_cap import (
    cap_values,
)
from lightning_fedfisher.merge.without_trainer import merge_updates
from lightning_fedfisher.update import UpdateHeader

ROWS, COLUMNS = SHAPE = (3, 4)
KINDS = ("identity", "diagonal", "dense", "kronecker", "lookup", "ekfac", "lookup ekfac")
SHARES = (5.0, 1.0, 3.0, 2.0, 7.0)


class _Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(3, affine=False)
        self.register_buffer("index", torch.arange(4))
        self.register_buffer("mask", torch.tensor([True, False]))


def _with_buffers(samples, mean, var, count=5, index=(0, 1, 2, 3)):
    torch.manual_seed(0)
    model = _Normed()
    model.norm.running_mean.fill_(mean)
    model.norm.running_var.fill_(var)
    model.norm.num_batches_tracked.fill_(count)
    model.index.copy_(torch.tensor(index))
    layers = find_layers(model)
    blocks = {layer.name: Identity(layer.shape) for layer in layers}
    kinds = dict.fromkeys(blocks, "identity")
    header = UpdateHeader(samples, "identity", "", "categorical", 0, layers, kinds)
    return ClientUpdate.from_model(model, header, blocks)


def test_statistics_of_other_weights_are_told():
    alike, other = _with_buffers(10, 0.5, 2.0), _with_buffers(10, 0.5, 3.0)
    assert describe_mixed_statistics([alike]) == ""
    assert describe_mixed_statistics([alike, _with_buffers(30, 0.5, 2.0, count=9)]) == ""
    told = describe_mixed_statistics([alike, alike, other])
    assert "(norm.running_var)" in told
    assert "pass statistics_loader=" in told
    with pytest.warns(UserWarning, match="not those of the merged weights"):
        result = merge_updates([alike, other], method="fedavg")
    assert told in result.warnings


def test_a_hostile_client_does_not_own_the_buffers():
    honest = [_with_buffers(100 + k, 0.1 * k, 1 + 0.1 * k, count=k) for k in range(5)]
    mallory = _with_buffers(2**39, -1e12, 1e12, count=10**9, index=(10**6, 1, 2, 3))
    free = merge_buffers([*honest, mallory])
    assert float(free["norm.running_mean"].min()) < -1e11
    held = merge_buffers([*honest, mallory], max_influence=2)
    assert float(held["norm.running_mean"].abs().max()) < 0.5
    assert 0.5 < float(held["norm.running_var"].min()) < 2
    for merged in (free, held):
        assert merged["index"].tolist() == [0, 1, 2, 3]
        assert merged["mask"].tolist() == [True, False]
        assert merged["mask"].dtype == torch.bool
        assert int(merged["norm.num_batches_tracked"]) == 2


def test_honest_buffers_are_merged_as_without_a_bound():
    honest = [_with_buffers(100 + k, 0.1 * k, 1 + 0.1 * k, count=k) for k in range(5)]
    free, held = merge_buffers(honest), merge_buffers(honest, max_influence=10)
    for name, tensor in free.items():
        assert torch.equal(tensor, held[name]), name
    assert int(free["norm.num_batches_tracked"]) == 2


def _mixed(value, dtype=torch.float32):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("constant", torch.tensor([1.0, value], dtype=dtype))

    torch.manual_seed(0)
    model = Mixed()
    layers = find_layers(model)
    blocks = {layer.name: Identity(layer.shape) for layer in layers}
    kinds = dict.fromkeys(blocks, "identity")
    header = UpdateHeader(9, "identity", "", "categorical", 0, layers, kinds)
    return ClientUpdate.from_model(model, header, blocks)


@pytest.mark.parametrize("most", [1, 2, 10])
@pytest.mark.parametrize("place", [0, 3, 5])
def test_nobody_moves_what_most_agree_on(place, most):
    honest = [_with_buffers(100 + k, 0.5, 2.0) for k in range(5)]
    mallory = _with_buffers(100, 1e12, 1e15)
    clients = [*honest[:place], mallory, *honest[place:]]
    held = merge_buffers(clients, max_influence=most)
    assert held["norm.running_mean"].tolist() == [0.5] * 3
    assert held["norm.running_var"].tolist() == [2.0] * 3
    assert float(merge_buffers(clients)["norm.running_mean"][0]) > 1e11


def test_one_entry_alone_is_bounded_as_all_together():
    # As far away as the others, but in one entry: by the norm it would be like them.
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(100, generator=generator).double() for _ in range(9)]
    values.append(torch.zeros(100).double())
    values[-1][3] = 10.0
    _, held = cap_values([1.0] * 10, values, 2.0)
    assert 0 < float(held[-1][3]) < 3
    assert torch.equal(held[-1][4:], values[-1][4:])


def test_half_of_the_clients_are_not_most():
    clients = [_mixed(value) for value in (3.0, 1.0, 9.0, 3.0)]
    assert merge_buffers(clients, 10)["constant"].tolist() == [1, 4]
    assert merge_buffers([*clients, clients[0]], 10)["constant"].tolist() == [1, 3]


@pytest.mark.parametrize("most", [2, math.inf])
def test_a_merge_bounds_the_buffers_as_the_layers(most):
    clients = [_with_buffers(100 + k, 0.1 * k, 1.0) for k in range(5)]
    clients.append(_with_buffers(100, 1e12, 1.0))
    module = FisherMergeModule(clients, method="fedavg", max_influence=most)
    assert (float(module.merged_state_dict()["norm.running_mean"][0]) < 0.5) == (most == 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("most", [1, 2, math.inf])
def test_the_largest_numbers_of_a_type_merge_to_numbers(most, dtype):
    largest = torch.finfo(dtype).max
    clients = {value: _mixed(value, dtype) for value in (-largest, largest, 0.0)}
    for values in itertools.product(clients, repeat=4):
        merged = merge_buffers([clients[value] for value in values], most)["constant"]
        assert merged.dtype == dtype
        assert torch.isfinite(merged).all(), values
        assert merged[0] == 1
        assert min(values) <= float(merged[1]) <= max(values)


def test_a_constant_that_most_hold_is_kept_whatever_it_is():
    lowest = torch.finfo(torch.float32).min
    clients = [_mixed(lowest), _mixed(-lowest), _mixed(lowest)]
    assert merge_buffers(clients, 2)["constant"].tolist() == [1, lowest]


def test_a_variance_that_float16_cannot_hold_is_the_largest_that_it_can():
    clients = [_with_buffers(10, mean, 1.0) for mean in (-3e4, 3e4)]
    for client in clients:
        for name in ("running_mean", "running_var"):
            client._tensors[f"buffers/norm.{name}"] = client.buffers[f"norm.{name}"].half()
    merged = merge_buffers(clients)
    assert merged["norm.running_mean"].tolist() == [0, 0, 0]
    assert merged["norm.running_var"].tolist() == [torch.finfo(torch.float16).max] * 3


@pytest.mark.parametrize("most", [10, math.inf])
def test_buffers_are_those_of_the_pooled_samples(most):
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(40, 3, generator=generator).double() + 0.1 * k for k in range(4)]
    clients = []
    for rows in data:
        client = _with_buffers(len(rows), 0.0, 1.0)
        client._tensors["buffers/norm.running_mean"] = rows.mean(0)
        client._tensors["buffers/norm.running_var"] = rows.var(0, unbiased=False)
        clients.append(client)
    merged, pooled = merge_buffers(clients, most), torch.cat(data)
    torch.testing.assert_close(merged["norm.running_mean"], pooled.mean(0))
    torch.testing.assert_close(merged["norm.running_var"], pooled.var(0, unbiased=False))


@pytest.mark.parametrize(
    ("attack", "bound"),
    [
        ({"mean": 1e12, "var": 1.2}, 1.5),
        ({"mean": 0.2, "var": 1e12}, 1.5),
        ({"samples": 2**39, "mean": 0.9, "var": 1.2}, 1.5),
    ],
    ids=str,
)
def test_each_statistic_is_held_by_itself(attack, bound):
    honest = [_with_buffers(100 + k, 0.1 * k, 1 + 0.1 * k) for k in range(5)]
    mallory = _with_buffers(**{"samples": 100} | attack)
    held = merge_buffers([*honest, mallory], max_influence=2)
    assert 0.1 < float(held["norm.running_mean"][0]) < 0.6
    assert 1.0 < float(held["norm.running_var"][0]) < bound
    order = [3, 5, 0, 4, 1, 2]
    turned = merge_buffers([[*honest, mallory][i] for i in order], max_influence=2)
    for name, tensor in held.items():
        torch.testing.assert_close(turned[name], tensor)


def test_what_is_held_of_plain_values_is_the_median_clients():
    shares = [1.0, 2.0, 3.0, 4.0, 1e6]
    values = [torch.tensor([x, 0.0]).double() for x in (-2.0, -1.0, 0.0, 1.0, 1e9)]
    held, drawn = cap_values(shares, values, 2.0)
    assert held == pytest.approx([1, 2, 3, 4, 6])
    # Of the distances 0, 1, 1, 2 and 1e9 the median is 1.
    assert [float(v[0]) for v in drawn] == pytest.approx([-2, -1, 0, 1, 2])
    assert all(one is other for one, other in zip(drawn[:4], values[:4], strict=True))
    same, still = cap_values(shares, values, math.inf)
    assert same == shares
    assert all(one is other for one, other in zip(still, values, strict=True))


@pytest.mark.parametrize(
    ("values", "merged"),
    [
        ([3, 3, 9], 3),
        ([9, 3, 3], 3),
        ([3, 3, 9, 9], 3),
        ([3, 5, 9, 10**9], 5),
        ([3, 3, 3, 9], 3),
        ([7, 7, 7, 2], 7),
        ([4, 6], 6),  # neither of whom can be judged by others
        ([5], 5),
    ],
    ids=str,
)
def test_whole_numbers_are_the_lower_median(values, merged):
    clients = [_with_buffers(9, 0.0, 1.0, index=(0, 1, 2, value)) for value in values]
    for most in (1, math.inf):
        found = merge_buffers(clients, most)["index"]
        assert found.dtype == torch.int64
        assert found.tolist() == [0, 1, 2, merged]


def test_one_buffer_of_all_clients_is_in_memory_at_a_time(tmp_path, monkeypatch):
    clients = [_with_buffers(10 * k, k, 1.0 + k) for k in (1, 2, 3)]
    expected = merge_buffers(clients)
    files = [client.save(tmp_path / f"{k}.safetensors") for k, client in enumerate(clients)]
    updates = [ClientUpdate.open(file) for file in files]
    held, most, read = weakref.WeakSet(), [], ClientUpdate.buffer

    def reading(self, name):
        held.add(found := read(self, name))
        most.append(len(held))
        return found

    monkeypatch.setattr(ClientUpdate, "buffer", reading)
    monkeypatch.setattr(ClientUpdate, "buffers", None)
    merged = merge_buffers(updates)
    describe_mixed_statistics(updates)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())
    assert merged.keys() == expected.keys()
    assert max(most) <= 3 * len(updates)  # a variance and its mean, and what was merged before


def test_what_all_clients_agree_on_is_held_twice_however_many_they_are(monkeypatch):
    same = [_with_buffers(10 * k, 0.5, 1.0) for k in range(1, 9)]
    held, most, read = weakref.WeakSet(), [], ClientUpdate.buffer

    def reading(self, name):
        found = read(self, name).clone()
        if name == "index":
            held.add(found)
            most.append(len(held))
        return found

    monkeypatch.setattr(ClientUpdate, "buffer", reading)
    merged = merge_buffers(same)
    assert len(most) == len(same)
    assert max(most) <= 3
    for name, tensor in merged.items():
        assert torch.equal(tensor, same[0]._tensors[f"buffers/{name}"]), name


def test_masks_that_are_infinite_are_passed_on_and_no_single_client_decides_them():
    class Masked(nn.Module):
        def __init__(self, mask):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("mask", mask)

    causal = nn.Transformer.generate_square_subsequent_mask(3)
    updates = []
    for mask in (causal, causal, torch.zeros(3, 3)):
        model = Masked(mask)
        layers = find_layers(model)
        kinds = {layer.name: "identity" for layer in layers}
        header = UpdateHeader(5, "identity", "", "categorical", 0, layers, kinds)
        blocks = {layer.name: Identity(layer.shape) for layer in layers}
        updates.append(ClientUpdate.from_model(model, header, blocks))
    assert torch.equal(merge_buffers(updates)["mask"], causal)
