"""Merges by the inputs' second moment alone: closed answers, K-FAC's, and dense matrices."""

import pytest
import torch
from helpers.networks import BATCH, NETS, build_net, make_data
from helpers.quadratics import relative_error
from oracles import merge as oracle
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher import ClientUpdate, extract_curvature, merge_updates
from lightning_fedfisher.extraction.layer_types import convolution as convolutions

CLIENTS = (12, 20, 16)  # samples


def _update(model, data, kind="input_gram", **options):
    loader = DataLoader(data, BATCH)
    found = extract_curvature(model, loader, kind, progress=False, **options)
    return ClientUpdate.from_model(model, found.header(), found.blocks)


def _clients(net, kind, **options):
    """Clients that differ in their weights and their data."""
    updates = []
    for seed, samples in enumerate(CLIENTS):
        model = build_net(net)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn(
                    parameter.shape, generator=generator, dtype=parameter.dtype
                )
        updates.append(_update(model, make_data(NETS[net][1], samples, seed), kind, **options))
    return updates


@pytest.mark.parametrize("method", ["regmean", "fedfisher"])
@pytest.mark.parametrize("net", ["lenet", "embedding", "transposed", "norms"])
def test_one_client_and_identical_clients_return_themselves(method, net, tmp_path):
    model = build_net(net)
    path = tmp_path / "update.safetensors"
    opened = ClientUpdate.open(_update(model, make_data(NETS[net][1])).save(path))
    for updates in ([opened], [opened, opened, opened]):
        merged = merge_updates(updates, method=method).state_dict
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(merged[name], parameter.detach(), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("memory_budget", [2**30, 0], ids=["memory", "disk"])
def test_least_squares_clients_merge_to_the_pooled_solution(bias, memory_budget):
    generator = torch.Generator().manual_seed(0)
    updates, everything = [], []
    for samples in CLIENTS:
        x, noise = (
            torch.randn(samples, size, dtype=torch.float64, generator=generator) for size in (4, 2)
        )
        x = x + torch.randn(4, dtype=torch.float64, generator=generator)
        y = torch.stack([x[:, 0] ** 2, x[:, 1] - x[:, 3]], dim=1) + noise
        columns = torch.cat([x, torch.ones(samples, int(bias), dtype=torch.float64)], dim=1)
        solution = torch.linalg.lstsq(columns, y).solution.T
        model = nn.Linear(4, 2, bias=bias).double()
        with torch.no_grad():
            model.weight.copy_(solution[:, :4])
            if bias:
                model.bias.copy_(solution[:, 4])
        data = TensorDataset(x, y)
        updates.append(_update(model, data, likelihood="gaussian", max_samples=None))
        everything.append((columns, y))
    columns, y = (torch.cat(part) for part in zip(*everything, strict=True))
    pooled = torch.linalg.lstsq(columns, y).solution.T
    merged = merge_updates(updates, method="regmean", memory_budget=memory_budget).state_dict
    found = torch.cat([merged["weight"], *([merged["bias"][:, None]] if bias else [])], dim=1)
    assert relative_error(found, pooled) < 1e-9
    average = sum(
        n * update.weights(update.layers[0]) for n, update in zip(CLIENTS, updates, strict=True)
    )
    assert relative_error(average / sum(CLIENTS), pooled) > 0.01


@pytest.mark.parametrize("patch", [1024, 4])
@pytest.mark.parametrize("net", ["lenet", "functional", "positions", "embedding", "norms"])
def test_regmean_is_the_same_as_from_kfac(monkeypatch, net, patch):
    monkeypatch.setattr(convolutions, "_LARGEST_PATCH", patch)
    alone = merge_updates(_clients(net, "input_gram"), method="regmean")
    of_kfac = merge_updates(_clients(net, "kfac"), method="regmean")
    assert alone.solved
    for name, tensor in alone.state_dict.items():
        torch.testing.assert_close(tensor, of_kfac.state_dict[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("net", ["functional", "lenet"])
def test_fedfisher_takes_its_square_root_and_aligns(net):
    clients = _clients(net, "input_gram", max_samples=None)
    result = merge_updates(clients, max_influence=float("inf"))
    expected, starts = oracle.fedfisher(clients)
    assert result.solved
    for layer in clients[0].layers:
        found = layer.join(result.state_dict)
        assert relative_error(found, expected[layer.name]) < 2e-3
        assert relative_error(starts[layer.name], expected[layer.name]) > 1e-2
