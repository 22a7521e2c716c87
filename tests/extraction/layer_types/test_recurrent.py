import itertools

import pytest
import torch
from helpers.layer_calls import draw
from torch import nn
from torch.overrides import TorchFunctionMode

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


@pytest.mark.parametrize("flags", itertools.product([False, True], repeat=len(FLAGS)))
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
