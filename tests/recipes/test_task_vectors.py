"""Merges by task vectors against their definitions, and where the answer is known."""

import copy

import pytest
import torch
from peers.task_vectors import PEERS, linear_weights, merge_by_task_vectors
from torch import nn


def _network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.Flatten()
    ).append(nn.Linear(24, 10))


def _trained(network, seed):
    """Parameters by name, some way from where they were."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: weight.detach() + torch.randn(weight.shape, generator=generator)
        for name, weight in network.named_parameters()
    }


def _close(found, expected, **options):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **options)


def test_matrices_are_those_of_linear_maps():
    assert linear_weights(_network()) == {"0.weight", "4.weight"}
    assert linear_weights(nn.Linear(2, 2)) == {"weight"}
    assert linear_weights(nn.MultiheadAttention(2, 1)) == {"in_proj_weight", "out_proj.weight"}


@pytest.mark.parametrize("method", PEERS)
def test_the_network_is_not_changed_and_nothing_learned_changes_nothing(method):
    network = _network()
    before = copy.deepcopy(network.state_dict())
    same = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    _close(merge_by_task_vectors(method, network, [same, same]), same)
    merge_by_task_vectors(method, network, [_trained(network, 1), _trained(network, 2)])
    _close(network.state_dict(), before)


@pytest.mark.parametrize(("method", "clients"), [("tsv", 1), ("actmat", 1), ("actmat", 3)])
def test_clients_that_agree_return_themselves(method, clients):
    network = _network()
    trained = _trained(network, 1)
    _close(
        merge_by_task_vectors(method, network, [trained] * clients), trained, rtol=1e-3, atol=1e-4
    )


def test_tsv_takes_half_of_the_rank_of_one_of_two_clients_that_learned_anything():
    change = torch.randn(4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = PEERS["tsv"]([{"w": change}, {"w": torch.zeros_like(change)}], {"w"})["w"]
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    torch.testing.assert_close(found, (left[:, :2] * values[:2]) @ right[:2])


def test_task_arithmetic_adds_four_tenths_of_each():
    network = _network()
    clients = [_trained(network, seed) for seed in (1, 2, 3)]
    expected = {
        name: weight.detach() + 0.4 * sum(client[name] - weight.detach() for client in clients)
        for name, weight in network.named_parameters()
    }
    _close(merge_by_task_vectors("task_arithmetic", network, clients), expected)


def test_ties_by_hand():
    # Of ten entries the two largest stay. Their signs: both up, then more up than down.
    one = [5.0, 4.0, 0.1, 0, 0, 0, 0, 0, 0, 0]
    two = [1.0, 0, 0, 0, 0, 0, 0, 0, 0.5, 0.9]
    three = [-2.0, 0, 0, 3.0, 0, 0, 0, 0, 0, 0.1]
    vectors = [{"w": torch.tensor(v[:5]), "b": torch.tensor(v[5:])} for v in (one, two, three)]
    found = PEERS["ties"](vectors, set())
    expected = [3.0, 4.0, 0, 3.0, 0, 0, 0, 0, 0, 0.9]
    torch.testing.assert_close(torch.cat([found["w"], found["b"]]), torch.tensor(expected))


def test_tsv_adds_up_what_does_not_meet():
    basis = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    parts = [basis[:, i : i + 2] @ torch.diag(torch.tensor([3.0, 2.0])) for i in (0, 2, 4)]
    changes = [part @ basis[:, i : i + 2].mT for part, i in zip(parts, (0, 2, 4), strict=True)]
    found = PEERS["tsv"]([{"w": change} for change in changes], {"w"})["w"]
    torch.testing.assert_close(found, sum(changes))
    averaged = PEERS["tsv"]([{"w": change} for change in changes], set())["w"]
    torch.testing.assert_close(averaged, sum(changes) / 3)


def test_tsv_makes_what_meets_orthogonal():
    generator = torch.Generator().manual_seed(1)
    changes = [torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    found = PEERS["tsv"]([{"w": change} for change in changes], {"w"})["w"]
    values = torch.cat([torch.linalg.svdvals(change)[:2] for change in changes])
    torch.testing.assert_close(torch.linalg.svdvals(found), values.sort(descending=True).values)


def test_more_clients_than_rank_are_averaged():
    changes = [torch.full((2, 5), float(k)) for k in range(3)]
    found = PEERS["tsv"]([{"w": change} for change in changes], {"w"})["w"]
    torch.testing.assert_close(found, torch.ones(2, 5))


@pytest.mark.parametrize("shape", [(3, 8), (8, 3)])
def test_actmat_is_the_least_squares_fit_of_what_clients_compute(shape):
    # Each client answers its own task vector's rows as if they were inputs.
    generator = torch.Generator().manual_seed(2)
    start, *clients = (torch.randn(shape, generator=generator).double() for _ in range(4))
    changes = [client - start for client in clients]
    inputs = torch.cat(changes)
    answers = torch.cat([change @ change.mT for change in changes], dim=1)
    expected = torch.linalg.lstsq(inputs, answers.mT, driver="gelsd").solution.mT
    found = PEERS["actmat"]([{"w": change} for change in changes], {"w"})["w"]
    torch.testing.assert_close(found, expected)
    average = sum(changes) / 3
    assert float((found - average).norm() / average.norm()) > 0.1
