import contextlib
import itertools

import pytest
import torch
from helpers.layer_calls import draw
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_fedfisher.extraction.layer_types.recurrence import known_linear
from lightning_fedfisher.extraction.layer_types.recurrent import RECURRENT

KINDS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
CELLS = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "tanh": nn.RNNCell,
    "relu": lambda *sizes, **options: nn.RNNCell(*sizes, nonlinearity="relu", **options),
}
FLAGS = ("bias", "batch_first", "bidirectional")


class _Open(TorchFunctionMode):
    """Runs what is written out in place of PyTorch's own."""

    def __init__(self):
        super().__init__()
        self.opened = self.refused = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in RECURRENT:
            output = RECURRENT[func](*args, **kwargs or {})
            self.opened += output is not NotImplemented
            self.refused += output is NotImplemented
            if output is not NotImplemented:
                return output
        return func(*args, **kwargs or {})


class _Maps(TorchFunctionMode):
    """Notes the linear maps with gradients that a recurrent layer is written out to."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in RECURRENT:
            with self:
                return RECURRENT[func](*args, **kwargs or {})
        output = func(*args, **kwargs or {})
        if func in (functional.linear, known_linear) and torch.is_grad_enabled():
            self.calls.append((args, output))
        return output


def _both(module, *args):
    """What PyTorch returns, and what is written out."""
    with torch.random.fork_rng():
        expected = module(*args)
    mode = _Open()
    with mode:
        found = module(*args)
    return found, expected, mode


def _check(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=len(FLAGS))))
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_the_same_functions(kind, num_layers, flags):
    torch.manual_seed(0)
    options = dict(zip(FLAGS, flags, strict=True))
    module = KINDS[kind](3, 4, num_layers, **options).double()
    found, expected, mode = _both(module, draw(5, 2, 3))
    _check(found, expected)
    assert (mode.opened, mode.refused) == (1, 0)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "bias": False}])
def test_projections_and_states_that_are_given(options):
    torch.manual_seed(0)
    module = nn.LSTM(3, 4, proj_size=2, **options).double()
    parts = 4 if options else 1
    found, expected, mode = _both(module, draw(5, 6, 3), (draw(parts, 6, 2), draw(parts, 6, 4)))
    _check(found, expected)
    assert mode.opened == 1
    gru = nn.GRU(3, 4).double()
    found, expected, _ = _both(gru, draw(5, 6, 3), draw(1, 6, 4))
    _check(found, expected)


def test_a_sequence_without_a_batch():
    torch.manual_seed(0)
    found, expected, mode = _both(nn.LSTM(3, 4).double(), draw(5, 3))
    _check(found, expected)
    assert mode.opened == 1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", CELLS)
def test_cells_are_the_same_functions(kind, bias):
    torch.manual_seed(0)
    cell = CELLS[kind](3, 4, bias=bias).double()
    found, expected, mode = _both(cell, draw(5, 3))
    _check(found, expected)
    states = (draw(5, 4, seed=1), draw(5, 4, seed=2))
    _check(*_both(cell, draw(5, 3), states if kind == "lstm" else states[0])[:2])
    assert mode.opened == 1


def test_packed_sequences_and_dropout_are_left_alone():
    torch.manual_seed(0)
    sequences = [draw(3, 3), draw(2, 3)]
    for kind in KINDS.values():
        module = kind(3, 4, 2, dropout=0.5).double().train()
        assert _both(module, draw(5, 2, 3))[2].refused == 1
        found, expected, mode = _both(module.eval(), draw(5, 2, 3))
        _check(found, expected)
        assert mode.opened == 1
        found, expected, mode = _both(module, nn.utils.rnn.pack_sequence(sequences))
        _check(found[0].data, expected[0].data)
        assert (mode.opened, mode.refused) == (0, 1)


def _gradients(module, inputs, states, opened):
    """Gradients at all parameters, the input and the first states, of all that is returned."""
    leaves = [*module.parameters(), inputs, *states]
    given = tuple(states) if len(states) > 1 else (*states, None)[0]
    mode = _Open()
    with mode if opened else contextlib.nullcontext():
        outputs, last = module(inputs, given)
    assert mode.opened == opened
    everything = torch.cat([part.flatten() for part in (outputs, *last)])
    weights = torch.cos(torch.arange(len(everything), dtype=everything.dtype))
    return torch.autograd.grad((weights * everything.square()).sum(), leaves)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=len(FLAGS))))
@pytest.mark.parametrize("kind", KINDS)
def test_layers_have_the_same_gradients(kind, flags, given):
    torch.manual_seed(0)
    options = dict(zip(FLAGS, flags, strict=True))
    module = KINDS[kind](3, 4, 2, **options).double()
    inputs = draw(5, 6, 3).requires_grad_()
    parts = (2 * (1 + options["bidirectional"]), 5 if options["batch_first"] else 6, 4)
    count = (1 + (kind == "lstm")) * given
    states = [draw(*parts, seed=1 + n).requires_grad_() for n in range(count)]
    expected, found = (_gradients(module, inputs, states, opened) for opened in (False, True))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_maps_of_all_positions_are_one_call_each_and_see_the_gradients_at_each(kind):
    torch.manual_seed(0)
    module, inputs = KINDS[kind](3, 4).double(), draw(5, 2, 3)
    maps = _Maps()
    with maps:
        output, _ = module(inputs)
    given = [arguments[0] for arguments, _ in maps.calls]
    _check(given[0], inputs)
    _check(given[1], torch.cat([torch.zeros_like(output[:1]), output[:-1]]))
    gradients = torch.autograd.grad(output.square().sum(), [result for _, result in maps.calls])
    weights = torch.autograd.grad(module(inputs)[0].square().sum(), list(module.parameters())[:2])
    for call, gradient, expected in zip(given, gradients, weights, strict=True):
        found = torch.einsum("tnr,tnc->rc", gradient, call)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_several_gradients_go_back_through_one_forward_pass(kind):
    torch.manual_seed(0)
    module, inputs = KINDS[kind](3, 4, 2).double(), draw(5, 2, 3).requires_grad_()
    with _Open():
        output, _ = module(inputs)
    expected, _ = module(inputs)
    for seed in (1, 2, 1):
        direction = draw(5, 2, 4, seed=seed)
        found = torch.autograd.grad(output, inputs, direction, retain_graph=True)
        wanted = torch.autograd.grad(expected, inputs, direction, retain_graph=True)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
