"""The merge of convolutions whose curvature is channels times kernel, against dense matrices."""

import dataclasses
import math

import pytest
import torch
from helpers.networks import make_data
from helpers.quadratics import reference_minimum, relative_error
from oracles import merge as oracle
from torch import nn
from torch.utils.data import DataLoader

from lightning_fedfisher import ClientUpdate, extract_curvature, merge_updates
from lightning_fedfisher.curvature import ConvolutionKronecker
from lightning_fedfisher.extraction.layer_types import convolution as convolutions
from lightning_fedfisher.merge.disk_cache import OnDiskCurvatures
from lightning_fedfisher.merge.objective import Quadratic
from lightning_fedfisher.merge.solvers import exact_solver


def _factor(size, seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size + 1, dtype=torch.float64, generator=generator)
    return root @ root.T / size


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_the_minimum_is_that_of_the_dense_problem(has_bias, power):
    shares = [1.0, 2.0, 3.0]
    curvatures = [
        ConvolutionKronecker(*(_factor(n, 10 * k + n) for n in (3, 2, 4)), has_bias).power(power)
        for k in range(3)
    ]
    weights = [torch.randn(3, 8 + has_bias, dtype=torch.float64) for _ in range(3)]
    solver = exact_solver(Quadratic(shares, weights, curvatures), rcond=1e-9)
    solver.advance(500)
    operators = [oracle.written_out(curvature) for curvature in curvatures]
    assert solver.converged
    assert relative_error(solver.weights, reference_minimum(shares, weights, operators)) < 1e-3


def _client(seed, network):
    torch.manual_seed(seed)
    model = network()
    data = DataLoader(make_data((2, 6, 6), 12, seed=seed), batch_size=5)
    extracted = extract_curvature(model.double(), data, progress=False)
    return model, ClientUpdate.from_model(model, extracted.header(), extracted.blocks)


def _chain():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    )


@pytest.mark.parametrize("method", ["fedfisher", "regmean"])
def test_one_client_and_identical_clients_return_themselves(monkeypatch, method, tmp_path):
    monkeypatch.setattr(convolutions, "_LARGEST_PATCH", 8)
    model, update = _client(0, _chain)
    assert "convolution_kronecker" in update.header.kinds.values()
    opened = ClientUpdate.open(update.save(tmp_path / "update.safetensors"))
    for updates in ([opened], [opened, opened, opened]):
        merged = merge_updates(updates, method=method).state_dict
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(merged[name], parameter.detach(), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("method", ["fedfisher", "regmean"])
def test_the_product_of_channels_and_kernel_merges_as_what_it_stands_for(monkeypatch, method):
    monkeypatch.setattr(convolutions, "_LARGEST_PATCH", 8)
    updates, written_out = [], []
    for seed in range(3):
        model, update = _client(seed, _chain)
        updates.append(update)
        blocks = {
            name: block.to_kronecker() if isinstance(block, ConvolutionKronecker) else block
            for name, block in update.blocks.items()
        }
        kinds = {name: block.kind for name, block in blocks.items()}
        header = dataclasses.replace(update.header, kinds=kinds)
        written_out.append(ClientUpdate.from_model(model, header, blocks))
    assert updates[0].header.fed_by.keys() == {"2", "5"}
    # Without a bound, which is one of each factor.
    found, expected = (
        merge_updates(clients, method=method, max_influence=math.inf)
        for clients in (updates, written_out)
    )
    assert found.solved
    for name, tensor in found.state_dict.items():
        assert relative_error(tensor, expected.state_dict[name]) < 1e-3, name


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_a_kernel_of_any_rank_is_worked_on_from_disk(rank):
    shares, size = [1.0, 2.0], 4
    weights = [torch.randn(3, 2 * size + 1, dtype=torch.float64) for _ in shares]
    curvatures, root = [], torch.randn(size, rank, dtype=torch.float64)
    for k in range(2):
        factors = _factor(3, k), _factor(2, 7 + k), root @ root.T
        curvatures.append(ConvolutionKronecker(*factors, has_bias=True))
    solvers = [
        exact_solver(Quadratic(shares, weights, held), rcond=1e-9)
        for held in (curvatures, OnDiskCurvatures(curvatures, torch.device("cpu")))
    ]
    for solver in solvers:
        solver.advance(200)
    assert solvers[0].converged
    assert torch.equal(solvers[0].weights, solvers[1].weights)
