import pytest
import torch
from helpers.layer_calls import draw
from torch.nn import functional

from lightning_fedfisher.extraction.layer_types.recurrence import (
    GRU,
    LSTM,
    RELU,
    TANH,
    known_linear,
    run_layer,
)

CELLS = {"lstm": (LSTM, 4, 2), "gru": (GRU, 3, 1), "tanh": (TANH, 1, 1), "relu": (RELU, 1, 1)}
POSITIONS, SAMPLES, FEATURES = 5, 2, 3


def _step_by_step(cell, order, mapped, first, weight, bias):
    """The same layer, left to autograd."""
    state, states = first, {}
    for t in order:
        state = cell.step(mapped[t], functional.linear(state[0], weight, bias), state)
        states[t] = state[0]
    return torch.stack([states[t] for t in range(len(order))]), *state[1:]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("order", [range(POSITIONS), range(POSITIONS)[::-1]])
@pytest.mark.parametrize("name", CELLS)
def test_gradients_are_those_of_each_step(name, order, has_bias):
    cell, gates, parts = CELLS[name]
    mapped = draw(POSITIONS, SAMPLES, gates * FEATURES)
    first = tuple(draw(SAMPLES, FEATURES, seed=1 + n) for n in range(parts))
    weight, bias = draw(gates * FEATURES, FEATURES, seed=3), draw(gates * FEATURES, seed=4)
    leaves = [mapped, *first, weight, *([bias] if has_bias else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    found, expected = (
        run(cell, order, mapped, first, weight, bias if has_bias else None)
        for run in (run_layer, _step_by_step)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    for seed in (5, 6):  # the first way back leaves everything as it was
        at = tuple(draw(*part.shape, seed=seed + n) for n, part in enumerate(found))
        both = [
            torch.autograd.grad(out, leaves, at, retain_graph=True) for out in (found, expected)
        ]
        torch.testing.assert_close(*both, rtol=1e-12, atol=1e-13)


def test_states_may_be_changed_in_place():
    weight, first = draw(FEATURES, FEATURES).requires_grad_(), (draw(SAMPLES, FEATURES, seed=1),)
    mapped = draw(POSITIONS, SAMPLES, FEATURES, seed=2)
    gradients = []
    for run in (run_layer, _step_by_step):
        (states,) = run(TANH, range(POSITIONS), mapped, first, weight, None)
        gradients += torch.autograd.grad(states.mul_(2).square_().sum(), weight)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-13)


def test_a_known_output_has_the_gradients_of_a_linear_map():
    inputs, direction = draw(POSITIONS, SAMPLES, 3), draw(POSITIONS, SAMPLES, 4, seed=1)
    weight, bias = draw(4, 3, seed=2).requires_grad_(), draw(4, seed=3).requires_grad_()
    expected = functional.linear(inputs, weight, bias)
    found = known_linear(inputs, weight, bias, expected.detach())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    both = [torch.autograd.grad(out, [weight, bias], direction) for out in (found, expected)]
    torch.testing.assert_close(*both, rtol=1e-12, atol=1e-13)
