"""Solvers: the minimum they reach, where they stay, and how they end, against dense formulas."""

import copy
import weakref
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from helpers.quadratics import (
    COLUMNS,
    ELEMENTWISE,
    KINDS,
    ROWS,
    SEEDS,
    SHAPE,
    SHARES,
    SOLVERS,
    make_problem,
    make_spd,
    reference_dense,
    reference_minimum,
    reference_objective,
    reference_published,
    reference_solution,
    reference_square_root,
    relative_error,
    solved,
)

from lightning_fedfisher.curvature.base import Identity
from lightning_fedfisher.curvature.dense import Dense
from lightning_fedfisher.curvature.kronecker import Kronecker
from lightning_fedfisher.merge.methods import METHODS
from lightning_fedfisher.merge.objective import LazyCurvatures, Quadratic, average, norm
from lightning_fedfisher.merge.solvers import (
    ClosedForm,
    ConjugateGradient,
    PublishedServer,
    Solver,
    exact_solver,
)

# The minimum


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_solver_reaches_the_dense_minimum(kind, seed):
    problem = make_problem(kind, seed)
    solver = exact_solver(problem)
    assert type(solver) is (ClosedForm if kind in ELEMENTWISE else ConjugateGradient)
    if kind not in ELEMENTWISE:
        solver = ConjugateGradient(problem, tolerance=1e-10)
    start = problem.objective(solver.weights)
    assert torch.equal(solver.weights, problem.average)
    solver.advance(1000)
    assert solver.finished
    assert solver.residual <= 1e-10
    assert relative_error(solver.weights, reference_solution(problem)) < 1e-8
    if kind != "identity":
        assert problem.objective(solver.weights) < 0.999 * start


def _kept(problem, weights):
    """Of the objective without any weights, the part that these weights avoid."""
    lost, whole = (
        float(reference_objective(problem, w.double()))
        for w in (weights, torch.zeros_like(weights))
    )
    return 1 - lost / whole


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_agreement_is_what_the_iterate_keeps_of_what_there_would_be_to_lose(kind, seed):
    problem = make_problem(kind, seed)
    for name in _solvers_for(kind):
        solver = SOLVERS[name](problem)
        for steps in (0, 1, 1000):
            solver.advance(steps)
            assert solver.agreement == pytest.approx(_kept(problem, solver.weights), rel=1e-9)
        assert 0 < solver.agreement < 1


@pytest.mark.parametrize("tolerance", [1e-4, 1e-12])  # the latter in float64
def test_agreement_counts_what_the_solver_leaves_out_as_well(tolerance):
    # Most directions are just too weak for it, and there are many of them.
    spectrum = torch.full((40,), 9e-4)
    spectrum[0] = 1.0
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(3, 40, generator=generator) for _ in range(2)]
    curvatures = [Kronecker(torch.eye(3), (k + 1) * torch.diag(spectrum)) for k in range(2)]
    problem = Quadratic([1, 2], weights, curvatures)
    solver = solved(problem, partial(ConjugateGradient, rcond=1e-3, tolerance=tolerance))
    assert solver.iterations > 0
    assert solver.agreement == pytest.approx(_kept(problem, solver.weights), rel=1e-5)


@pytest.mark.parametrize(("first", "second", "expected"), [(1, 1, 1), (1, 3, 0.8), (1, -1, 0)])
def test_agreement_where_it_is_known(first, second, expected):
    # Of 1 and 3 the mean is 1 from each, where no weights at all would be 1 and 3: 1 of (1 + 9) / 2
    weights = [torch.tensor([[float(value)]]) for value in (first, second)]
    problem = Quadratic([1, 1], weights, [Identity((1, 1))] * 2)
    assert solved(problem).agreement == pytest.approx(expected)
    nothing = Quadratic([1, 1], [torch.zeros(1, 1)] * 2, [Identity((1, 1))] * 2)
    assert solved(nothing).agreement == 1


@pytest.mark.parametrize("kind", KINDS)
def test_conjugate_gradient_solves_every_kind(kind):
    problem = make_problem(kind, seed=5)
    solver = solved(problem, partial(ConjugateGradient, tolerance=1e-12))
    assert solver.finished
    assert relative_error(solver.weights, reference_solution(problem)) < 1e-9


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["kronecker", "dense"])
def test_conjugate_gradient_descends(kind, seed):
    problem = make_problem(kind, seed)
    solver = ConjugateGradient(problem, tolerance=1e-10)
    best = problem.objective(reference_solution(problem))
    excess, residuals = [problem.objective(solver.weights) - best], [solver.residual]
    while not solver.finished:
        solver.advance(1)
        excess.append(problem.objective(solver.weights) - best)
        residuals.append(solver.residual)
    # The objective falls at every step, by theory; the residual need not, but does not run away.
    assert all(after < before + 1e-13 for before, after in pairwise(excess))
    assert all(r < 2 * min(residuals[: i + 1]) for i, r in enumerate(residuals))
    assert residuals[-1] < 1e-10
    # As many steps as dimensions suffice but for rounding; mean Dense curvature is exact.
    assert solver.iterations == len(residuals) - 1 <= (2 if kind == "dense" else ROWS * COLUMNS + 4)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-8])
def test_tolerance_is_the_residual_at_the_end(tolerance):
    problem = make_problem("kronecker", seed=2)
    solver = ConjugateGradient(problem, tolerance)
    residuals = [solver.residual]
    while not solver.finished:
        solver.advance(1)
        residuals.append(solver.residual)
    assert residuals[-1] <= tolerance * (1 + 1e-6)
    assert all(residual > tolerance for residual in residuals[:-1])
    gradient = sum(
        p * reference_dense(f) @ (solver.weights - w).flatten()
        for p, w, f in zip(problem.client_weights, problem.weights, problem.curvatures, strict=True)
    )
    assert residuals[-1] == pytest.approx(float(gradient.norm()) / problem.start.pull, rel=1e-6)


def test_the_preconditioner_takes_the_condition_away():
    generator = torch.Generator().manual_seed(0)

    def factor(size):
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator).double())[0]
        return (basis * torch.logspace(0, -2, size).double()) @ basis.mT

    rows, columns = 8, 10
    base = factor(rows), factor(columns)
    curvatures = [
        Kronecker(base[0] * (1 + k), base[1] + 1e-3 * make_spd(columns, generator))
        for k in range(3)
    ]
    weights = [torch.randn(rows, columns, generator=generator).double() for _ in range(3)]
    solver = solved(Quadratic(SHARES, weights, curvatures))
    assert solver.finished
    # The condition number is 1e4: without it, as many steps as the 80 dimensions.
    assert solver.iterations <= 12


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_reaches_the_minimum_to_its_tolerance(kind, seed):
    problem = make_problem(kind, seed, dtype=torch.float32)
    solver = solved(problem)
    assert solver.weights.dtype == torch.float32
    assert solver.finished
    assert solver.residual < 1.5e-4
    assert relative_error(solver.weights, reference_solution(problem)) < 2e-3


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_closed_form_is_the_fisher_weighted_mean_in_one_step(kind):
    problem = make_problem(kind)
    solver = ClosedForm(problem)
    assert not solver.finished
    solver.advance(10)
    assert solver.iterations == 1
    values = [reference_dense(f).diagonal().view(SHAPE) for f in problem.curvatures]
    above = sum(n * f * w for n, f, w in zip(SHARES, values, problem.weights, strict=True))
    below = sum(n * f for n, f in zip(SHARES, values, strict=True))
    torch.testing.assert_close(solver.weights, above / below, rtol=1e-12, atol=1e-12)
    assert solver.residual < 1e-12


@pytest.mark.parametrize("kind", ["kronecker", "dense"])
def test_closed_form_refuses_what_couples_weights(kind):
    with pytest.raises(ValueError, match=f"no closed form with {kind} curvature"):
        ClosedForm(make_problem(kind))


@pytest.mark.parametrize("seed", SEEDS)
def test_tempered_kronecker_is_the_dense_square_root(seed):
    problem = make_problem("kronecker", seed)
    roots = [reference_square_root(reference_dense(f)) for f in problem.curvatures]
    for root, curvature in zip(roots, problem.curvatures, strict=True):
        torch.testing.assert_close(root @ root, reference_dense(curvature))
    tempered = Quadratic(SHARES, problem.weights, [f.power(0.5) for f in problem.curvatures])
    found = solved(tempered, partial(ConjugateGradient, tolerance=1e-10)).weights
    expected = reference_minimum(SHARES, problem.weights, roots)
    assert relative_error(found, expected) < 1e-8
    assert relative_error(expected, reference_solution(problem)) > 1e-2  # the power matters


# What no client knows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_closed_form_stays_at_the_average_where_no_client_has_curvature(dtype):
    problem = make_problem("diagonal", dtype=dtype)
    blind = torch.zeros(SHAPE, dtype=torch.bool)
    blind[1] = blind[:, 2] = True
    for curvature in problem.curvatures:
        curvature.values[blind] = 0
    problem.curvatures[0].values[0, 0] = 0  # of one client only
    solver = solved(problem)
    assert torch.equal(solver.weights[blind], problem.average[blind])
    assert (solver.weights != problem.average)[~blind].all()
    assert relative_error(solver.weights, reference_solution(problem)) < (
        1e-12 if dtype == torch.float64 else 1e-6
    )


@pytest.mark.parametrize("seed", range(4))
def test_rounding_takes_no_step_where_only_the_mean_curvature_sees_anything(seed):
    """Rows that one client knows with columns that another knows; and a goal below float32."""
    generator = torch.Generator().manual_seed(seed)
    turns = [
        torch.linalg.qr(torch.randn(size, size, generator=generator).double()).Q for size in (6, 8)
    ]
    curvatures, weights = [], []
    for client in range(2):
        factors = []
        for turn in turns:
            values = torch.rand(len(turn), generator=generator).double() + 0.1
            values[client::2] = 0
            factors.append(((turn * values) @ turn.mT).float())
        curvatures.append(Kronecker(*factors))
        weights.append(torch.randn(6, 8, generator=generator))
    solver = ConjugateGradient(Quadratic([1.0, 2.0], weights, curvatures), tolerance=1e-12)
    solver.advance(500)
    assert solver.finished
    assert solver.residual < 3e-6
    assert norm(solver.weights) < 1.5 * max(map(norm, weights))


def test_closed_form_divides_curvature_fainter_than_float32():
    problem = make_problem("diagonal", dtype=torch.float32)
    for curvature in problem.curvatures:
        curvature.values.mul_(1e-43)  # a few steps of the smallest number
    expected = reference_solution(problem)
    known = sum(curvature.values for curvature in problem.curvatures) > 0
    found = solved(problem).weights
    assert relative_error(found[known], expected[known]) < 1e-6


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("solver", [ConjugateGradient, exact_solver])
def test_no_curvature_at_all_is_the_average(solver, kind):
    full = make_problem(kind)
    flat = [
        type(f).from_tensors({n: torch.zeros_like(t) for n, t in f.tensors().items()}, SHAPE)
        for f in full.curvatures
    ]
    problem = Quadratic(SHARES, full.weights, flat)
    done = solved(problem, solver)
    assert done.finished
    assert done.residual == 0
    assert torch.equal(done.weights, problem.average)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_client_without_curvature_follows_the_other(kind):
    full = make_problem(kind, clients=2)
    zeros = {n: torch.zeros_like(t) for n, t in full.curvatures[1].tensors().items()}
    blind = type(full.curvatures[1]).from_tensors(zeros, SHAPE)
    problem = Quadratic([1, 1000], full.weights, [full.curvatures[0], blind])
    solver = exact_solver(problem)
    if kind not in ELEMENTWISE:
        solver = ConjugateGradient(problem, tolerance=1e-11)
    solver.advance(1000)
    assert relative_error(solver.weights, full.weights[0]) < 1e-8


def _singular(kind, seed, power=None, dtype=torch.float64):
    """Clients whose factors share a null space, and the projection onto what some of them see."""
    generator = torch.Generator().manual_seed(seed)

    def basis(size):
        return torch.linalg.qr(torch.randn(size, size, generator=generator).double())[0][:, 1:]

    rows, columns = basis(ROWS), basis(COLUMNS)
    weights = [torch.randn(SHAPE, generator=generator).double() for _ in range(3)]
    curvatures = []
    for _ in range(3):
        output = rows @ make_spd(ROWS - 1, generator) @ rows.mT
        inputs = columns @ make_spd(COLUMNS - 1, generator) @ columns.mT
        if kind == "kronecker":
            curvature = Kronecker(output, inputs)
        else:
            curvature = Dense(torch.kron(output, inputs), SHAPE)
        curvature = curvature.to(torch.device("cpu"), dtype)
        curvatures.append(curvature if power is None else curvature.power(power))
    problem = Quadratic(SHARES, [w.to(dtype) for w in weights], curvatures)
    return problem, lambda matrix: rows @ (rows.mT @ matrix.double() @ columns) @ columns.mT


def _drift(kind, seed, tolerance, power=None, dtype=torch.float64):
    """How far the weights move where no client has curvature, and where some have."""
    problem, seen = _singular(kind, seed, power, dtype)
    solver = solved(problem, partial(ConjugateGradient, tolerance=tolerance))
    assert solver.finished
    move = solver.weights.double() - problem.average.double()
    return float((move - seen(move)).norm()), float(seen(move).norm())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["kronecker", "dense"])
def test_conjugate_gradient_stays_at_the_average_in_a_common_null_space(kind, seed):
    unseen, seen = _drift(kind, seed, tolerance=1e-8)
    assert unseen < 1e-6
    assert seen > 0.1


def _of_few_samples(seed, size=40, samples=30):
    """Clients whose factors are singular, each elsewhere, so that gains get smaller slowly."""
    generator = torch.Generator().manual_seed(seed)

    def factor():
        drawn = torch.randn(samples, size, generator=generator).double()
        drawn = drawn * torch.logspace(0, -2, size, dtype=torch.float64)
        return drawn.mT @ drawn / samples

    weights = [torch.randn(size, size, generator=generator).double() for _ in SHARES]
    curvatures = [Kronecker(factor(), factor()).power(0.5) for _ in SHARES]
    return Quadratic(SHARES, weights, curvatures)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("gap", [1e-2, 1e-3])
def test_the_objective_ends_as_near_its_minimum_as_asked(gap, seed):
    problem = _of_few_samples(seed)
    tight = solved(problem, partial(ConjugateGradient, rcond=1e-3, tolerance=1e-6))
    near = solved(problem, partial(ConjugateGradient, rcond=1e-3, relative_gap=gap))
    assert near.converged
    assert near.iterations < tight.iterations / 2
    assert near.point.objective <= (1 + 5 * gap) * tight.point.objective


OURS = replace(METHODS["fedfisher"], name="undamped", damping=0.0)  # which has null spaces


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["kronecker", "dense"])
def test_tempered_clients_stay_at_the_average_in_a_common_null_space(kind, dtype, seed):
    # Rounded to float32, the null space is none: the root of its eigenvalues is 3e-4 of the rest.
    problem, seen = _singular(kind, seed, dtype=dtype)
    tempered = [OURS.transformed(curvature) for curvature in problem.curvatures]
    solver = solved(Quadratic(SHARES, problem.weights, tempered), OURS.solver)
    assert solver.finished
    move = solver.weights.double() - problem.average.double()
    rounding = 1e-6 if dtype == torch.float32 else 1e-12
    assert float((move - seen(move)).norm()) < rounding
    exact, _ = _singular(kind, seed)
    roots = [_root_within(curvature, seen) for curvature in exact.curvatures]
    expected = reference_minimum(SHARES, exact.weights, roots) - exact.average
    assert relative_error(seen(move), expected) < 2e-3
    assert float(expected.norm()) > 0.1


def _root_within(curvature, seen):
    """The square root of an operator, made regular by what lies outside what is seen."""
    basis = torch.eye(ROWS * COLUMNS).double()
    projector = torch.stack([seen(row.view(SHAPE)).flatten() for row in basis], dim=1)
    return reference_square_root(reference_dense(curvature) + basis - projector) - (
        basis - projector
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["kronecker", "dense"])
def test_residual_is_that_of_directions_with_curvature(kind, seed):
    problem, seen = _singular(kind, seed, power=0.5, dtype=torch.float32)
    solver = OURS.solver(problem)
    operators = [reference_dense(curvature) for curvature in problem.curvatures]
    total = sum(SHARES)
    weights = [matrix.double() for matrix in problem.weights]
    start = sum(n / total * w for n, w in zip(SHARES, weights, strict=True))

    def forces(matrix):
        clients = zip(SHARES, operators, weights, strict=True)
        return [n / total * (f @ (matrix - w).flatten()).view(SHAPE) for n, f, w in clients]

    pull = sum(float(force.norm()) for force in forces(start))
    reported = []
    while True:
        gradient = sum(forces(solver.weights.double()))
        expected = float(seen(gradient).norm()) / pull
        assert solver.residual == pytest.approx(expected, rel=0.1, abs=2e-6)
        reported.append(solver.residual)
        if solver.finished:
            break
        solver.advance(1)
    assert reported[0] > 0.01
    assert reported[-1] <= 1.1e-4


def test_clients_that_are_blind_in_unlike_directions_are_solved():
    # The mean of such Kronecker products sees more than any client: of the many minimisers, one.
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(SHAPE, generator=generator).double() for _ in SHARES]
    curvatures = [
        Kronecker(make_spd(ROWS, generator, rank=1), make_spd(COLUMNS, generator, rank=1))
        for _ in SHARES
    ]
    problem = Quadratic(SHARES, weights, curvatures)
    solver = solved(problem, partial(ConjugateGradient, tolerance=1e-10))
    assert solver.finished
    best = float(reference_objective(problem, reference_solution(problem)))
    start = float(reference_objective(problem, problem.average))
    assert float(reference_objective(problem, solver.weights)) <= best + 1e-12 * start


def _dead(rows, columns, every, dtype, power):
    """Clients none of which ever uses some outputs and inputs, and a mask of their weights."""
    generator = torch.Generator().manual_seed(0)
    shape = (rows, columns)
    dead = torch.zeros(shape, dtype=torch.bool)
    dead[1::every] = dead[:, 2::every] = True
    weights = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    curvatures = []
    for _ in range(3):
        outputs = torch.randn(10 * rows, rows, generator=generator, dtype=torch.float64)
        inputs = torch.randn(10 * columns, columns, generator=generator, dtype=torch.float64).relu()
        outputs[:, 1::every] = inputs[:, 2::every] = 0
        factors = (outputs.mT @ outputs / len(outputs), inputs.mT @ inputs / len(inputs))
        curvatures.append(Kronecker(*(factor.to(dtype) for factor in factors)).power(power))
    return Quadratic(SHARES, weights, curvatures), dead


@pytest.mark.parametrize("size", [(3, 4), (20, 50)], ids=str)
@pytest.mark.parametrize(("power", "drift"), [(1, 1e-9), (0.5, 1e-2)])
def test_dead_inputs_and_outputs_stay_at_the_average(power, drift, size):
    problem, dead = _dead(*size, every=7, dtype=torch.float64, power=power)
    solver = solved(problem)
    assert solver.finished
    move = solver.weights - problem.average
    assert float(move[~dead].abs().max()) > 0.05
    assert float(move[dead].abs().max()) < drift


# Where float32 does not suffice


def _ill_conditioned(decades, dtype, rows=6, columns=8):
    """Kronecker clients of one spectrum over many decades, and no two of one basis."""
    generator = torch.Generator().manual_seed(0)

    def factor(size):
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator).double())[0]
        return (basis * torch.logspace(0, -decades, size).double()) @ basis.mT

    weights = [torch.randn(rows, columns, generator=generator).to(dtype) for _ in range(3)]
    factors = [(factor(rows).to(dtype), factor(columns).to(dtype)) for _ in range(3)]
    problem = Quadratic((3, 2, 1), weights, [Kronecker(*pair) for pair in factors])
    operators = [torch.kron(*(factor.double() for factor in pair)) for pair in factors]
    return problem, reference_minimum((3, 2, 1), weights, operators), operators


def test_what_float32_cannot_reach_is_reached_in_float64():
    problem, expected, operators = _ill_conditioned(3, torch.float32)
    tolerance = 1e-9
    solver = ConjugateGradient(problem, tolerance)
    assert solver.weights.dtype == torch.float32
    solver.advance(1000)
    assert solver.finished
    assert solver.weights.dtype == torch.float64
    assert solver.residual <= 1.1 * tolerance
    terms = zip((3, 2, 1), operators, problem.weights, strict=True)
    gradient = sum(n / 6 * f @ (solver.weights - w.double()).flatten() for n, f, w in terms)
    assert float(gradient.norm()) / problem.start.pull <= 1.1 * tolerance
    assert relative_error(solver.weights, expected) < 1e-6
    assert solver.iterations < 200
    # In float32 alone it would have ended in a gradient a hundred times as large.
    rounded = solver.weights.float().double()
    terms = zip((3, 2, 1), operators, problem.weights, strict=True)
    gradient = sum(n / 6 * f @ (rounded - w.double()).flatten() for n, f, w in terms)
    assert float(gradient.norm()) / problem.start.pull > 10 * tolerance


def test_what_float32_reaches_stays_in_float32():
    problem, _, _ = _ill_conditioned(3, torch.float32)
    solver = solved(problem)
    assert solver.finished
    assert solver.weights.dtype == torch.float32
    assert solver.residual <= 1.1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("decades", [1, 3])
def test_a_tolerance_out_of_reach_ends_as_far_as_it_goes(decades, dtype):
    problem, expected, _ = _ill_conditioned(decades, dtype)
    solver = ConjugateGradient(problem, tolerance=0.0, rcond=0.0)
    solver.advance(20_000)
    assert solver.finished
    assert solver.iterations < 5000
    assert torch.isfinite(solver.weights).all()
    assert solver.residual < 1e-12
    assert relative_error(solver.weights, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_curvature_that_is_negative_by_rounding_ends(dtype):
    problem = make_problem("dense", dtype=dtype)
    spoiled = []
    for curvature in problem.curvatures:
        values, basis = torch.linalg.eigh(curvature.matrix.double())
        values[:4] = torch.tensor([-1e-2, -1e-3, -1e-6, 0]) * values.max()
        spoiled.append(Dense(((basis * values) @ basis.mT).to(dtype), SHAPE))
    for rcond in (0.0, 1e-6, 1e-3):
        solver = ConjugateGradient(Quadratic(SHARES, problem.weights, spoiled), 1e-6, rcond)
        solver.advance(20_000)
        assert solver.finished
        assert torch.isfinite(solver.weights).all()


# Curvature that is read at every use


class _Read(LazyCurvatures):
    """Counts what is made, and looks at what is kept."""

    def __init__(self, curvatures):
        self._curvatures = list(curvatures)
        self.kinds = [type(curvature) for curvature in curvatures]
        self.reads = self.most = 0
        self._alive = []

    def __getitem__(self, index):
        curvature = copy.deepcopy(self._curvatures[index])
        self.reads += 1
        self._alive = [ref for ref in self._alive if ref() is not None]
        self._alive.append(weakref.ref(curvature))
        self.most = max(self.most, len(self._alive))
        return curvature


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_curvature_read_at_every_use_gives_the_same_bits(kind, dtype):
    for name in _solvers_for(kind):
        problem = make_problem(kind, dtype=dtype)
        lazy = _Read(problem.curvatures)
        there = SOLVERS[name](Quadratic(SHARES, problem.weights, lazy))
        begun = lazy.reads
        assert begun <= 6 * 3
        here = SOLVERS[name](problem)
        for solver in (here, there):
            solver.advance(5)
        assert torch.equal(there.weights, here.weights)
        assert there.iterations == here.iterations
        assert there.residual == here.residual
        assert there.problem.objective(there.weights) == here.problem.objective(here.weights)
        assert lazy.most <= 2  # the one at work, and the one that follows
        # A step is one pass; then there is one for all looks, and up to two at a solver's end.
        steps = there.iterations
        assert 3 * steps <= lazy.reads - begun <= 3 * (steps + 3)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_asked_of_all_curvatures_is_not_read(kind):
    lazy = _Read(make_problem(kind).curvatures)
    problem = Quadratic(SHARES, make_problem(kind).weights, lazy)
    assert problem.in_double().kind is problem.kind is type(make_problem(kind).curvatures[0])
    assert lazy.reads == 0
    # At the average: its figures, and the mean.
    passes = {"dense": 2, "kronecker": 2}.get(kind, 1)
    solver = exact_solver(problem)
    assert lazy.reads == 3 * passes
    assert solver.residual >= 0
    assert lazy.reads == 3 * passes
    solver.advance(1)
    before = lazy.reads
    objective, residual = solver.point.objective, solver.residual
    # The step of a dense one ended with a look, and the identity made none.
    looks = 0 if kind in ("dense", "identity") else 3
    assert lazy.reads == before + looks
    assert residual == solver.residual
    assert lazy.reads == before + looks
    assert objective == problem.objective(solver.weights)


def test_several_kinds_are_told_without_reading():
    problem, other = make_problem("kronecker"), make_problem("diagonal")
    lazy = _Read([*problem.curvatures[:2], other.curvatures[2]])
    with pytest.raises(ValueError, match=r"of several kinds: \['diagonal', 'kronecker'\]"):
        Quadratic(SHARES, problem.weights, lazy)
    assert lazy.reads == 0


def test_curvature_read_at_every_use_goes_on_in_float64_one_at_a_time():
    problem, _, _ = _ill_conditioned(3, torch.float32)
    lazy = _Read(problem.curvatures)
    here = ConjugateGradient(problem, 1e-9)
    there = ConjugateGradient(Quadratic((3, 2, 1), problem.weights, lazy), 1e-9)
    for solver in (here, there):
        solver.advance(1000)
    assert there.weights.dtype == torch.float64
    assert torch.equal(there.weights, here.weights)
    assert lazy.most <= 2
    # Steps read what was written in the eigenbasis, in float64 as well: from disk.
    assert there.iterations > 100
    assert lazy.reads < there.iterations


def test_a_direction_of_negative_curvature_is_not_followed():
    # By rounding, as it were; the mean of the factors does not show it.
    one, other = (torch.tensor(v).double().diag() for v in ([1.0, 0.0], [0.0, 1.0]))
    steep = torch.tensor([1.0, -1e-2]).double().diag()
    curvatures = [Kronecker(steep, one), Kronecker(torch.eye(2).double(), other)]
    weights = [torch.zeros(2, 2).double() for _ in range(2)]
    weights[0][1, 0] = 1  # where the curvature is negative
    problem = Quadratic([1, 1], weights, curvatures)
    solver = solved(problem, iterations=5000)
    assert solver.finished
    assert torch.equal(solver.weights, problem.average)


# One client, equal clients


def _solvers_for(kind):
    return [n for n in SOLVERS if n != "closed form" or kind in ELEMENTWISE]


EVERY_SOLVER = [(kind, name) for kind in KINDS for name in _solvers_for(kind)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("kind", "name"), EVERY_SOLVER)
def test_one_client_is_returned_to_the_bit(kind, name, dtype):
    problem = make_problem(kind, clients=1, dtype=dtype)
    solver = solved(problem, SOLVERS[name], iterations=50)
    assert torch.equal(solver.weights, problem.weights[0])
    assert solver.residual == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("kind", "name"), EVERY_SOLVER)
def test_clients_that_agree_are_returned_to_the_bit(kind, name, dtype):
    other = make_problem(kind, dtype=dtype)
    problem = Quadratic(SHARES, [other.weights[0].clone() for _ in SHARES], other.curvatures)
    solver = SOLVERS[name](problem)
    assert problem.start.pull == solver.residual == problem.objective(solver.weights) == 0
    solver.advance(50)
    assert torch.equal(solver.weights, problem.weights[0])
    assert solver.residual == 0


@pytest.mark.parametrize("kind", KINDS)
def test_clients_of_one_curvature_merge_to_the_average(kind):
    other = make_problem(kind)
    problem = Quadratic(SHARES, other.weights, [other.curvatures[0]] * 3)
    solver = ConjugateGradient(problem)
    assert solver.finished  # what is left of the gradient is rounding
    torch.testing.assert_close(solved(problem).weights, problem.average, rtol=1e-12, atol=1e-12)


# Symmetries


@pytest.mark.parametrize(("kind", "name"), EVERY_SOLVER)
def test_order_of_clients_does_not_matter(kind, name):
    problem = make_problem(kind)
    order = [2, 0, 1]
    turned = Quadratic(
        [SHARES[i] for i in order],
        [problem.weights[i] for i in order],
        [problem.curvatures[i] for i in order],
    )
    here, there = (solved(p, SOLVERS[name], iterations=60) for p in (problem, turned))
    assert relative_error(there.weights, here.weights) < 1e-9
    assert relative_error(here.weights, problem.average) > (-1 if kind == "identity" else 1e-3)


@pytest.mark.parametrize("scale", [2.0**-40, 1e-9, 1e6, 2.0**40])
@pytest.mark.parametrize("kind", ["diagonal", "kronecker", "dense"])
@pytest.mark.parametrize("solver", [ConjugateGradient, exact_solver])
def test_scale_of_the_curvature_does_not_matter(solver, kind, scale):
    problem = make_problem(kind)
    scaled = [
        type(f).from_tensors(
            f.tensors() | {n: scale * t for n, t in [*f.tensors().items()][:1]}, SHAPE
        )
        for f in problem.curvatures
    ]
    here = solved(problem, solver)
    there = solved(Quadratic(SHARES, problem.weights, scaled), solver)
    assert there.iterations == here.iterations
    assert relative_error(there.weights, here.weights) < 1e-10
    assert there.residual == pytest.approx(here.residual, rel=1e-3, abs=1e-13)


@pytest.mark.parametrize("scale", [1e-9, 1 / 853, 1e12])
@pytest.mark.parametrize(("kind", "name"), EVERY_SOLVER)
def test_scale_of_the_shares_does_not_matter(kind, name, scale):
    problem = make_problem(kind)
    scaled = Quadratic([scale * n for n in SHARES], problem.weights, problem.curvatures)
    here, there = (solved(p, SOLVERS[name], iterations=60) for p in (problem, scaled))
    assert relative_error(there.weights, here.weights) < 1e-10
    point = torch.ones(SHAPE).double()
    assert scaled.objective(point) == pytest.approx(problem.objective(point), rel=1e-12)


def test_shares_are_weights_of_the_clients():
    problem = make_problem("kronecker", clients=2, shares=(2, 1))
    twice = Quadratic(
        [1, 1, 1],
        [problem.weights[i] for i in (0, 0, 1)],
        [problem.curvatures[i] for i in (0, 0, 1)],
    )
    solver = partial(ConjugateGradient, tolerance=1e-11)
    here, there = solved(problem, solver), solved(twice, solver)
    assert relative_error(there.weights, here.weights) < 1e-9


# Steps


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_published_server_makes_the_authors_steps(kind, inside):
    problem = make_problem(kind)
    operators = [reference_dense(curvature) for curvature in problem.curvatures]
    solver = PublishedServer(problem, damping_inside=inside)
    for steps in (1, 10, 50):
        solver.advance(steps - solver.iterations)
        expected = reference_published(SHARES, problem.weights, operators, steps, inside)
        torch.testing.assert_close(solver.weights, expected, rtol=1e-10, atol=1e-10)
        other = reference_published(SHARES, problem.weights, operators, steps, not inside)
        if kind != "identity":  # which starts at its minimum
            assert relative_error(solver.weights, other) > 1e-5
    assert not solver.finished


@pytest.mark.parametrize(("kind", "name"), EVERY_SOLVER)
def test_steps_in_pieces_are_the_same_steps(kind, name):
    problem = make_problem(kind)
    at_once, pieces = SOLVERS[name](problem), SOLVERS[name](problem)
    at_once.advance(6)
    for steps in (1, 0, 3, 2):
        pieces.advance(steps)
    assert torch.equal(pieces.weights, at_once.weights)
    assert pieces.iterations == at_once.iterations
    assert pieces.finished == at_once.finished
    assert pieces.residual == at_once.residual
    if name.startswith("published"):
        assert at_once.iterations == 6


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_solver_stops(kind):
    solver = solved(make_problem(kind))
    assert solver.finished
    iterations, weights = solver.iterations, solver.weights.clone()
    assert iterations < 1000
    solver.advance(5)
    assert solver.iterations == iterations
    assert torch.equal(solver.weights, weights)


@pytest.mark.parametrize(("kind", "name"), EVERY_SOLVER)
def test_solvers_leave_the_problem_alone(kind, name):
    problem = make_problem(kind)
    before = copy.deepcopy(problem)
    solved(problem, SOLVERS[name], iterations=5)
    assert problem.client_weights == before.client_weights
    for field in ("weights", "curvatures"):
        for now, then in zip(getattr(problem, field), getattr(before, field), strict=True):
            parts = (
                (now.tensors(), then.tensors())
                if field == "curvatures"
                else ({"": now}, {"": then})
            )
            assert all(torch.equal(parts[0][name], parts[1][name]) for name in parts[1])
    assert torch.equal(problem.average, average(SHARES, before.weights))


def test_dead_inputs_and_outputs_stay_at_the_average_in_float32():
    problem, dead = _dead(20, 50, every=7, dtype=torch.float32, power=0.5)
    move = solved(problem).weights - problem.average
    assert float(move[dead].abs().max()) < 1e-2


def test_faint_curvature_of_float32_is_no_absence_of_curvature():
    problem = make_problem("kronecker", dtype=torch.float32)
    faint = [Kronecker(f.row_factor * 1e-24, f.column_factor) for f in problem.curvatures]
    here = solved(problem)
    there = solved(Quadratic(SHARES, problem.weights, faint))
    assert relative_error(there.weights, here.weights.double()) < 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_weights_changed_in_place_have_a_gradient_of_their_own(kind):
    problem = make_problem(kind)
    matrix = problem.average.clone()
    before = problem.gradient(matrix)
    matrix.add_(1.0)
    after = problem.gradient(matrix)
    torch.testing.assert_close(after - before, problem.matvec(torch.ones_like(matrix)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_place_is_seen_and_leaves_the_problem_alone(kind):
    class Downhill(Solver):
        def _step(self):
            self.weights.sub_(0.1 * self.problem.gradient(self.weights))

    problem = make_problem(kind)
    average = problem.average.clone()
    solver = Downhill(problem)
    for _ in range(3):
        solver.advance(1)
        objective, residual = solver.point.objective, solver.residual
        assert objective == problem.objective(solver.weights)
        gradient = problem.gradient(solver.weights)
        assert residual == pytest.approx(norm(gradient) / problem.start.pull)
    assert torch.equal(problem.average, average)
    assert solver.iterations == 3


@pytest.mark.parametrize("name", [name for name in SOLVERS if name.startswith("published")])
def test_a_gradient_that_is_known_is_not_computed_again(name):
    problem = make_problem("kronecker")
    lazy = _Read(problem.curvatures)
    solver = SOLVERS[name](Quadratic(SHARES, problem.weights, lazy))
    begun = lazy.reads
    for _ in range(5):
        solver.advance(1)
        assert solver.residual >= 0
    # The first step starts where everything is known; each evaluation serves the next step.
    assert lazy.reads - begun == 5 * len(SHARES)
