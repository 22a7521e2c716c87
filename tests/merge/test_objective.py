"""The merge objective: its value, gradient and Hessian-vector product against dense formulas."""

import pytest
import torch
from helpers.quadratics import (
    KINDS,
    SEEDS,
    SHAPE,
    SHARES,
    make_problem,
    reference_dense,
    reference_objective,
    relative_error,
    solved,
)

from lightning_fedfisher.curvature.base import Identity
from lightning_fedfisher.curvature.diagonal import Diagonal
from lightning_fedfisher.merge.objective import Quadratic, average

# The problem


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_objective_and_its_derivatives(kind, seed):
    problem = make_problem(kind, seed)
    generator = torch.Generator().manual_seed(seed + 100)
    point = torch.randn(SHAPE, generator=generator).double().requires_grad_()
    direction = torch.randn(SHAPE, generator=generator).double()
    value = reference_objective(problem, point)
    (gradient,) = torch.autograd.grad(value, point, create_graph=True)
    (curved,) = torch.autograd.grad((gradient * direction).sum(), point)
    assert problem.objective(point.detach()) == pytest.approx(value.item(), rel=1e-12)
    torch.testing.assert_close(problem.gradient(point), gradient / 2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(problem.matvec(direction), curved / 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_distances_are_in_each_clients_own_norm(kind, seed):
    problem = make_problem(kind, seed)
    point = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed + 100)).double()
    offsets = [(point - weights).flatten() for weights in problem.weights]
    expected = [
        float(offset @ reference_dense(curvature) @ offset) ** 0.5
        for offset, curvature in zip(offsets, problem.curvatures, strict=True)
    ]
    assert problem.at(point).distances == pytest.approx(expected, rel=1e-12)
    assert problem.at(problem.weights[1]).distances[1] == 0


@pytest.mark.parametrize("distance", [1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_objective_and_gradient_far_from_the_average(kind, dtype, distance):
    problem = make_problem(kind, dtype=dtype)
    generator = torch.Generator().manual_seed(100)
    point = (distance * torch.randn(SHAPE, generator=generator)).to(dtype)
    exact = point.double().clone().requires_grad_()
    value = reference_objective(problem, exact)
    (gradient,) = torch.autograd.grad(value, exact)
    rounding = 1e-5 if dtype == torch.float32 else 1e-13
    assert problem.objective(point) == pytest.approx(value.item(), rel=rounding)
    assert relative_error(problem.gradient(point), gradient / 2) < rounding


@pytest.mark.parametrize("seed", SEEDS)
def test_objective_is_not_negative_where_every_client_is_content(seed):
    # Each client is sure of weights of its own, so that the minimum is zero.
    problem = make_problem("diagonal", seed, clients=2, dtype=torch.float32)
    for curvature, others in zip(problem.curvatures, (slice(2, None), slice(2)), strict=True):
        curvature.values[:, others] = 0
    solver = solved(problem)
    assert 0 <= problem.objective(solver.weights) < 1e-6
    assert solver.point.objective == problem.objective(solver.weights)


@pytest.mark.parametrize("kind", KINDS)
def test_pull_is_what_the_clients_want_at_the_average(kind):
    problem = make_problem(kind)
    start = sum(n / sum(SHARES) * w for n, w in zip(SHARES, problem.weights, strict=True))
    pulls = [
        n / sum(SHARES) * float((reference_dense(f) @ (start - w).flatten()).norm())
        for n, w, f in zip(SHARES, problem.weights, problem.curvatures, strict=True)
    ]
    assert problem.start.pull == pytest.approx(sum(pulls), rel=1e-12)


def test_average_is_weighted_by_share():
    problem = make_problem("identity")
    expected = (700 * problem.weights[0] + 150 * problem.weights[1] + 3 * problem.weights[2]) / 853
    torch.testing.assert_close(average(SHARES, problem.weights), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(problem.average, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clients", [1, 2, 3, 7])
def test_average_of_equal_clients_is_exact(clients, dtype):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(50, 40, generator=generator).to(dtype)
    shares = [(17 * k + 3) / 7 for k in range(clients)]  # thirds and sevenths round
    assert torch.equal(average(shares, [matrix.clone() for _ in range(clients)]), matrix)


def test_problems_that_do_not_fit_together_are_refused():
    matrix = torch.zeros(SHAPE)
    diagonal, identity = Diagonal(torch.ones(SHAPE)), Identity(SHAPE)
    with pytest.raises(ValueError, match=r"of several kinds: \['diagonal', 'identity'\]"):
        Quadratic([1, 1], [matrix, matrix], [identity, diagonal])
    for shares, weights, curvatures in (
        ([], [], []),
        ([1], [matrix, matrix], [identity, identity]),
        ([1, 1], [matrix], [identity, identity]),
        ([1, 1], [matrix, matrix], [identity]),
    ):
        with pytest.raises(ValueError, match="one client weight, weight matrix and curvature"):
            Quadratic(shares, weights, curvatures)
