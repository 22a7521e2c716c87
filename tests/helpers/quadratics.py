"""Small merge problems, and their dense solutions by formulas that share no code with ours."""

from functools import partial

import torch

from lightning_fedfisher.curvature.base import Identity
from lightning_fedfisher.curvature.dense import Dense
from lightning_fedfisher.curvature.diagonal import Diagonal
from lightning_fedfisher.curvature.kronecker import Kronecker
from lightning_fedfisher.merge.objective import Quadratic
from lightning_fedfisher.merge.solvers import (
    ClosedForm,
    ConjugateGradient,
    PublishedServer,
    exact_solver,
)

ROWS, COLUMNS = SHAPE = (3, 4)
SHARES = (700, 150, 3)  # samples of three clients
KINDS = ("identity", "diagonal", "kronecker", "dense")
ELEMENTWISE = KINDS[:2]
SEEDS = range(4)
SOLVERS = {
    "closed form": ClosedForm,
    "conjugate gradient": ConjugateGradient,
    "published, damping inside": partial(PublishedServer, damping_inside=True),
    "published, damping outside": partial(PublishedServer, damping_inside=False),
}


def make_spd(size, generator, rank=None):
    """A random positive semi-definite matrix with eigenvalues of order one."""
    root = torch.randn(size, 3 * size if rank is None else rank, generator=generator).double()
    return root @ root.mT / root.shape[1]


def make_curvature(kind, generator):
    if kind == "identity":
        return Identity(SHAPE)
    if kind == "diagonal":
        return Diagonal(torch.rand(SHAPE, generator=generator).double() + 0.05)
    if kind == "kronecker":
        return Kronecker(make_spd(ROWS, generator), make_spd(COLUMNS, generator))
    return Dense(make_spd(ROWS * COLUMNS, generator), SHAPE)


def make_problem(kind, seed=0, clients=3, dtype=torch.float64, shares=SHARES):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(SHAPE, generator=generator).double() for _ in range(clients)]
    curvatures = [make_curvature(kind, generator) for _ in range(clients)]
    return Quadratic(
        shares[:clients],
        [matrix.to(dtype) for matrix in weights],
        [curvature.to(torch.device("cpu"), dtype) for curvature in curvatures],
    )


def solved(problem, solver=exact_solver, iterations=1000):
    solver = solver(problem)
    solver.advance(iterations)
    return solver


def reference_dense(curvature):
    """A curvature in full, in float64, by the definitions in the design."""
    if curvature.kind == "identity":
        return torch.eye(ROWS * COLUMNS).double()
    if curvature.kind == "diagonal":
        return torch.diag(curvature.values.double().flatten())
    if curvature.kind == "kronecker":
        return torch.kron(curvature.row_factor.double(), curvature.column_factor.double())
    return curvature.matrix.double()


def reference_objective(problem, matrix):
    """Q, differentiable."""
    total = sum(problem.client_weights)
    value = 0.0
    for share, weights, curvature in zip(
        problem.client_weights, problem.weights, problem.curvatures, strict=True
    ):
        offset = (matrix - weights.double()).flatten()
        value = value + share / total * offset @ reference_dense(curvature) @ offset
    return value


def reference_minimum(shares, weights, operators):
    """Of all minimisers, the one nearest to the average; operators are dense matrices."""
    total = sum(shares)
    shares = [share / total for share in shares]
    vectors = [matrix.double().flatten() for matrix in weights]
    start = sum(p * w for p, w in zip(shares, vectors, strict=True))
    system = sum(p * f for p, f in zip(shares, operators, strict=True))
    pulls = zip(shares, operators, vectors, strict=True)
    right = sum(p * f @ (w - start) for p, f, w in pulls)
    move = torch.linalg.lstsq(system, right[:, None], driver="gelsd").solution[:, 0]
    return (start + move).view(weights[0].shape)


def reference_solution(problem):
    operators = [reference_dense(curvature) for curvature in problem.curvatures]
    return reference_minimum(problem.client_weights, problem.weights, operators)


def reference_square_root(matrix):
    """Of a positive definite matrix, by the Denman-Beavers iteration: no eigenvalues."""
    root, inverse = matrix, torch.eye(len(matrix)).double()
    for _ in range(60):
        root, inverse = (
            (root + torch.linalg.inv(inverse)) / 2,
            (inverse + torch.linalg.inv(root)) / 2,
        )
    return root


def reference_published(shares, weights, operators, steps, inside):
    """The authors' server, from the paper's facts."""
    total = sum(shares)
    vectors = [matrix.double().flatten() for matrix in weights]
    w = sum(n / total * v for n, v in zip(shares, vectors, strict=True))
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for _ in range(steps):
        clients = zip(shares, operators, vectors, strict=True)
        g = sum(n / total * f @ (w - w_k) for n, f, w_k in clients)
        m = 0.9 * m + g
        v = 0.99 * v + g * g
        w = w - 0.01 * m / (torch.sqrt(v + 0.01) if inside else torch.sqrt(v) + 0.01)
    return w.view(weights[0].shape)


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())
