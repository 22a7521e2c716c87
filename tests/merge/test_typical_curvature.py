"""No client has far more of its curvature in a direction than the median client."""

import pytest
import torch

from lightning_fedfisher.curvature.base import Identity
from lightning_fedfisher.curvature.diagonal import Diagonal
from lightning_fedfisher.curvature.kronecker import EigenKronecker, Kronecker
from lightning_fedfisher.merge.disk_cache import OnDiskCurvatures
from lightning_fedfisher.merge.typical_curvature import TypicalCurvature


def _moment(size, seed, noise=0.3):
    generator = torch.Generator().manual_seed(seed)
    root = torch.eye(size) + noise * torch.randn(size, size, generator=generator)
    return (root @ root.mT).double()


def _kronecker(seed):
    return Kronecker(_moment(4, seed), _moment(5, seed + 100))


def test_clients_that_are_alike_are_left_as_they_are():
    clients = [_kronecker(seed) for seed in range(6)]
    typical = TypicalCurvature.of(clients)
    assert typical.all_bounded(clients, 100.0) is clients
    bounded = typical.all_bounded(clients, 1.0)
    assert all(new is not old for new, old in zip(bounded, clients, strict=True))


@pytest.mark.parametrize("hostile", [1, 3])
def test_who_has_all_in_one_direction_has_little_of_it_left(hostile):
    direction = torch.nn.functional.normalize(torch.arange(5.0).double(), dim=0)
    spike = Kronecker(_moment(4, 0), 5 * torch.outer(direction, direction))
    clients = [_kronecker(seed) for seed in range(10 - hostile)] + [spike] * hostile
    bounded = TypicalCurvature.of(clients).all_bounded(clients, 2.0)
    along = [float(direction @ c.column_factor @ direction) for c in bounded]
    traces = [float(c.column_factor.trace()) for c in clients]
    shares = sorted(a / t for a, t in zip(along[:-hostile], traces[:-hostile], strict=True))
    assert along[-1] / traces[-1] < 1.8 * (shares[len(shares) // 2] + 0.1 / 5)
    assert torch.linalg.eigvalsh(bounded[-1].column_factor).min() > -1e-9
    assert float(bounded[-1].column_factor.trace()) < 0.7 * traces[-1]


def test_values_are_bounded_one_by_one():
    clients = [Diagonal(torch.tensor([[1.0, 1.0, 2.0]])) for _ in range(4)]
    clients.append(Diagonal(torch.tensor([[8.0, 0.0, 0.0]])))
    bounded = TypicalCurvature.of(clients).all_bounded(clients, 2.0)
    assert all(new is old for new, old in zip(bounded[:4], clients[:4], strict=True))
    torch.testing.assert_close(
        bounded[4].values, torch.tensor([[8 * 2 * (0.25 + 0.1 / 3), 0.0, 0.0]])
    )


def test_distances_are_in_the_norm_of_the_median_client():
    clients = [Diagonal(torch.tensor([[3.0, 1.0]]))] * 3
    typical = TypicalCurvature.of(clients)
    assert typical.distance(torch.tensor([[2.0, 0.0]])) == pytest.approx(2 * (0.75 + 0.05) ** 0.5)
    assert typical.distance(torch.tensor([[0.0, 2.0]])) == pytest.approx(2 * (0.25 + 0.05) ** 0.5)


def test_clients_without_curvature_have_no_part_in_the_median():
    clients = [Diagonal(torch.zeros(1, 2))] * 3 + [Diagonal(torch.tensor([[3.0, 1.0]]))]
    shares = TypicalCurvature.of(clients).shares["values"]
    torch.testing.assert_close(shares, torch.tensor([[0.8, 0.3]]))
    nobody = TypicalCurvature.of(clients[:3])
    assert nobody.bounded(clients[0], 1.0) is clients[0]


def test_what_cannot_be_compared_is_not():
    assert TypicalCurvature.of([Identity((2, 2))] * 3) is None
    assert TypicalCurvature.of([_kronecker(0)] * 2) is None
    assert TypicalCurvature.of([Diagonal(torch.tensor([[float("inf")]]))] * 3) is None
    eigen = EigenKronecker(torch.eye(1), torch.eye(1), torch.ones(1, 1))
    assert TypicalCurvature.of([eigen] * 3) is None


def test_curvature_on_disk_is_bounded_alike():
    clients = [_kronecker(seed) for seed in range(5)]
    on_disk = OnDiskCurvatures(clients, torch.device("cpu"))
    typical = TypicalCurvature.of(on_disk)
    here, there = typical.all_bounded(clients, 1.0), typical.all_bounded(on_disk, 1.0)
    assert len(there) == len(here)
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.column_factor, other.column_factor)
