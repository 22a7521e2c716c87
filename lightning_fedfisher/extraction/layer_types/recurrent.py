"""Recurrent layers and cells, written out as the linear maps that they are made of.

PyTorch computes a whole sequence in one call, which shows neither the states that the recurrent
weights are applied to nor the gradients that come back. Written out, every weight is one of a
linear map: over all positions at once for the inputs, and step by step for the states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

State = tuple[Tensor, ...]
"""Hidden state, and for an LSTM the cell state, each of shape ``(samples, features)``."""

Step = Callable[[Tensor, Tensor, State], State]
"""The next state, from what the maps of the input and of the state give, and from the state."""


def _lstm_step(inputs: Tensor, hidden: Tensor, state: State) -> State:
    i, f, g, o = (inputs + hidden).chunk(4, dim=1)
    cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def _gru_step(inputs: Tensor, hidden: Tensor, state: State) -> State:
    size = 2 * state[0].shape[1]
    r, z = torch.sigmoid(inputs[:, :size] + hidden[:, :size]).chunk(2, dim=1)
    n = torch.tanh(inputs[:, size:] + r * hidden[:, size:])
    return (n + z * (state[0] - n),)


def _tanh_step(inputs: Tensor, hidden: Tensor, state: State) -> State:
    return (torch.tanh(inputs + hidden),)


def _relu_step(inputs: Tensor, hidden: Tensor, state: State) -> State:
    return (torch.relu(inputs + hidden),)


def open_cell(step: Step) -> Callable[..., Tensor | State]:
    """Writes out a function such as `torch.lstm_cell`.

    Args:
        step: What the cell does after its linear maps.

    Returns:
        The same function, made of linear maps.

    Example:
        >>> x, h = torch.randn(2, 3), torch.randn(2, 4)
        >>> w_ih, w_hh = torch.randn(4, 3), torch.randn(4, 4)
        >>> opened = open_cell(_tanh_step)(x, h, w_ih, w_hh)
        >>> torch.allclose(opened, torch.rnn_tanh_cell(x, h, w_ih, w_hh), atol=1e-6)
        True
    """

    def opened(
        inputs: Tensor,
        hx: Tensor | State,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor | State:
        state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        hidden = functional.linear(state[0], w_hh, b_hh)
        following = step(functional.linear(inputs, w_ih, b_ih), hidden, state)
        return following[0] if isinstance(hx, Tensor) else following

    return opened


def open_layers(step: Step) -> Callable[..., State]:
    """Writes out a function such as `torch.lstm`, of several layers and any number of positions.

    Args:
        step: What the cell does after its linear maps.

    Returns:
        The same function, made of linear maps. It returns NotImplemented for packed sequences,
        whose positions are sorted by another order than the samples, and for dropout.
    """

    def opened(
        inputs: Tensor,
        hx: Tensor | State,
        weights: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> State:
        # Of packed sequences, the weights are in this place, one later.
        if not isinstance(has_biases, bool) or (train and dropout > 0):
            return NotImplemented  # type: ignore[no-any-return]
        time, directions = int(batch_first), 1 + bidirectional
        initial = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        each = len(weights) // (num_layers * directions)
        last: list[State] = []
        for _ in range(num_layers):
            outputs = []
            for backwards in range(directions):
                place = len(last)
                w_ih, w_hh, *others = weights[place * each : (place + 1) * each]
                b_ih, b_hh = (others.pop(0), others.pop(0)) if has_biases else (None, None)
                state = tuple(part[place] for part in initial)
                states = []
                steps = functional.linear(inputs, w_ih, b_ih).unbind(time)
                for mapped in reversed(steps) if backwards else steps:
                    state = step(mapped, functional.linear(state[0], w_hh, b_hh), state)
                    for projection in others:
                        state = (functional.linear(state[0], projection), *state[1:])
                    states.append(state[0])
                outputs.append(torch.stack(states[::-1] if backwards else states, time))
                last.append(state)
            inputs = torch.cat(outputs, dim=2) if bidirectional else outputs[0]
        return inputs, *(torch.stack(parts) for parts in zip(*last, strict=True))

    return opened


RECURRENT: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.lstm: open_layers(_lstm_step),
    torch.gru: open_layers(_gru_step),
    torch.rnn_tanh: open_layers(_tanh_step),
    torch.rnn_relu: open_layers(_relu_step),
    torch.lstm_cell: open_cell(_lstm_step),
    torch.gru_cell: open_cell(_gru_step),
    torch.rnn_tanh_cell: open_cell(_tanh_step),
    torch.rnn_relu_cell: open_cell(_relu_step),
}
"""Each recurrent function of `torch`, written out."""
