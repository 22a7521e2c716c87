"""Recurrent layers and cells, written out as the linear maps that they are made of.

PyTorch computes a whole sequence in one call, which shows neither the states that the recurrent
weights are applied to nor the gradients that come back. Written out, every weight is one of a
linear map over all positions at once. Only the maps of a single cell, and the projections of an
LSTM, go step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_fedfisher.extraction.layer_types.recurrence import (
    GRU,
    LSTM,
    RELU,
    TANH,
    Cell,
    State,
    Tensors,
    run_layer,
)


def open_cell(cell: Cell) -> Callable[..., Tensor | State]:
    """Writes out a function such as `torch.lstm_cell`.

    Args:
        cell: What follows the linear maps.

    Returns:
        The same function, made of linear maps.

    Example:
        >>> x, h = torch.randn(2, 3), torch.randn(2, 4)
        >>> w_ih, w_hh = torch.randn(4, 3), torch.randn(4, 4)
        >>> opened = open_cell(TANH)(x, h, w_ih, w_hh)
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
        following = cell.step(functional.linear(inputs, w_ih, b_ih), hidden, state)
        return following[0] if isinstance(hx, Tensor) else following

    return opened


def open_layers(cell: Cell) -> Callable[..., State]:
    """Writes out a function such as `torch.lstm`, of several layers and any number of positions.

    Args:
        cell: What follows the linear maps.

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
                order = range(inputs.shape[time])
                mapped = functional.linear(inputs, w_ih, b_ih)
                run = _run_projected if others else run_layer
                states, *cells = run(
                    cell,
                    order[::-1] if backwards else order,
                    mapped.transpose(0, time),
                    tuple(part[place] for part in initial),
                    w_hh,
                    b_hh,
                    *others,
                )
                outputs.append(states.transpose(0, time))
                last.append((states[0 if backwards else -1], *cells))
            inputs = torch.cat(outputs, dim=2) if bidirectional else outputs[0]
        return inputs, *(torch.stack(parts) for parts in zip(*last, strict=True))

    return opened


def _run_projected(
    cell: Cell,
    order: range,
    mapped: Tensor,
    first: State,
    w_hh: Tensor,
    b_hh: Tensor | None,
    w_hr: Tensor,
) -> Tensors:
    """Does the same as `run_layer` step by step, with hidden states multiplied by a last weight."""
    steps, state = mapped.unbind(), first
    states = list(steps)
    for t in order:
        hidden, *cells = cell.step(steps[t], functional.linear(state[0], w_hh, b_hh), state)
        state = functional.linear(hidden, w_hr), *cells
        states[t] = state[0]
    return torch.stack(states), *state[1:]


RECURRENT: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.lstm: open_layers(LSTM),
    torch.gru: open_layers(GRU),
    torch.rnn_tanh: open_layers(TANH),
    torch.rnn_relu: open_layers(RELU),
    torch.lstm_cell: open_cell(LSTM),
    torch.gru_cell: open_cell(GRU),
    torch.rnn_tanh_cell: open_cell(TANH),
    torch.rnn_relu_cell: open_cell(RELU),
}
"""Each recurrent function of `torch`, written out."""
