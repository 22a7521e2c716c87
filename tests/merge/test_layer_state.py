"""The state of a layer: numbers for an all-reduce and back, and what is said of it."""

import pytest
import torch
from helpers.quadratics import make_problem

from lightning_fedfisher.merge.layer_state import (
    LayerState,
    Progress,
    describe_unsolved,
    summarize,
)
from lightning_fedfisher.merge.solvers import ConjugateGradient

STATES = [
    LayerState((1.5, 0.25), 20, 3.0, 1e-5, Progress.CONVERGED, 64, 0.75),
    LayerState((2.0, 1.0), 1000, 0.1, 1e-2, Progress.STOPPED, 32, 0.25),
    LayerState.waiting(2),
]


@pytest.mark.parametrize("state", STATES)
def test_a_state_comes_back_from_its_row(state):
    row = state.to_row()
    assert row.dtype == torch.float64
    assert row.shape == (LayerState.width(2),)
    assert LayerState.from_row(row) == state


def test_rows_of_several_ranks_add_up_to_the_owners():
    nothing = torch.zeros(LayerState.width(2), dtype=torch.float64)
    for state in STATES:
        assert LayerState.from_row(nothing + state.to_row() + nothing) == state


def test_only_what_makes_no_more_steps_is_done():
    assert [state.done for state in STATES] == [True, True, False]


def test_the_summary_is_of_all_layers():
    summary = summarize(STATES)
    assert summary == {"iterations": 1000.0, "objective": 3.1, "residual": 1.0}
    # In float64: many small objectives beside a large one are not lost.
    many = [LayerState((), objective=1e8), *[LayerState((), objective=1e-3)] * 1000]
    assert summarize(many)["objective"] == pytest.approx(1e8 + 1, abs=1e-6)


def test_layers_that_are_not_solved_are_named():
    told = describe_unsolved(["a", "b", "c"], STATES, converges=True)
    assert "has not converged in 2 of 3 layers" in told
    assert "b (residual 1.0e-02 after 1000 iterations)" in told
    assert "a (" not in told
    assert describe_unsolved(["a"], STATES[:1], converges=True) == ""
    # A number of steps is all that the published methods promise.
    assert describe_unsolved(["a", "b"], STATES[:2], converges=False) == ""
    assert "c (" in describe_unsolved(["a", "b", "c"], STATES, converges=False)


@pytest.mark.parametrize(("tolerance", "bits"), [(1e-4, 32), (1e-12, 64)])
def test_a_state_tells_how_far_and_in_which_precision_its_solver_came(tolerance, bits):
    problem = make_problem("kronecker", dtype=torch.float32)
    solver = ConjugateGradient(problem, tolerance)
    solver.advance(1)
    begun = LayerState.of(solver, max_iterations=100)
    assert (begun.done, begun.waits, begun.iterations, begun.bits) == (False, False, 1, 32)
    assert LayerState.of(solver, max_iterations=1).progress is Progress.STOPPED
    solver.advance(1000)
    ended = LayerState.of(solver, max_iterations=2000)
    assert (ended.progress, ended.bits) == (Progress.CONVERGED, bits)
    assert (ended.objective, ended.residual) == (solver.point.objective, solver.residual)
    assert ended.distances == solver.problem.at(solver.weights).distances
    assert LayerState.waiting(2).waits
