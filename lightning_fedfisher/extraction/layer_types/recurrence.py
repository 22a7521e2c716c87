"""The states of a recurrent layer as one operation, which goes back through time by itself.

Autograd takes many small operations at each position, and keeps what each of them needs. All that
goes back is the gradient at the state: multiplied by the slopes of the activations, which the
forward pass leaves, and by the recurrent weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import wrap_torch_function
from typing_extensions import override

State = tuple[Tensor, ...]
"""Hidden state, and for an LSTM the cell state, each of shape ``(samples, features)``."""

Tensors = tuple[Tensor, ...]


class Cell(ABC):
    """What a recurrent layer computes from the outputs of its two linear maps.

    The maps are one of the input and one of the hidden state. Each gives a vector for every gate,
    one after the other.
    """

    maps_alike: ClassVar[bool] = True
    """Whether the gradients at the outputs of both maps are the same."""

    def step(self, inputs: Tensor, hidden: Tensor, state: State) -> State:
        """Computes the next state.

        Args:
            inputs: Output of the map of the input, of shape ``(samples, gates * features)``.
            hidden: Output of the map of the hidden state, of the same shape.
            state: State before.
        """
        return self.activate(inputs, hidden, state)[0]

    @abstractmethod
    def activate(self, inputs: Tensor, hidden: Tensor, state: State) -> tuple[State, Tensors]:
        """Computes the next state, from the arguments of `step`, and the activations behind it."""

    @abstractmethod
    def slopes(self, activations: Tensors, state: State) -> Tensors:
        """Computes what `back` multiplies gradients by, at one position or at all of them.

        Args:
            activations: What `activate` returned besides the next state, with any dimensions before
                the last.
            state: State before.
        """

    @abstractmethod
    def back(
        self, slopes: Tensors, arriving: State, to_inputs: Tensor, to_hidden: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Takes gradients from a state to the outputs of the maps.

        Args:
            slopes: What `slopes` returned.
            arriving: Gradient at the state.
            to_inputs: Filled in with the gradient at the output of the map of the input.
            to_hidden: Filled in with that at the output of the map of the hidden state.

        Returns:
            The gradient at the state before, but for what goes through the map of the hidden state.
            None instead of zeros.
        """


class _Lstm(Cell):
    @override
    def activate(self, inputs: Tensor, hidden: Tensor, state: State) -> tuple[State, Tensors]:
        i, f, g, o = (inputs + hidden).chunk(4, dim=1)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        cell = torch.addcmul(f * state[1], i, g)
        out = torch.tanh(cell)
        return (o * out, cell), (i, f, g, o, out)

    @override
    def slopes(self, activations: Tensors, state: State) -> Tensors:
        i, f, g, o, out = activations
        by_cell = g * _of_sigmoid(i), state[1] * _of_sigmoid(f), i * _of_tanh(g)
        return torch.stack(by_cell, dim=-2), out * _of_sigmoid(o), o * _of_tanh(out), f

    @override
    def back(
        self, slopes: Tensors, arriving: State, to_inputs: Tensor, to_hidden: Tensor
    ) -> tuple[Tensor | None, ...]:
        by_cell, by_hidden, of_cell, kept = slopes
        hidden, cell = arriving
        cell = torch.addcmul(cell, hidden, of_cell)
        gates = to_hidden.view(len(to_hidden), 4, -1)
        torch.mul(by_cell, cell.unsqueeze(1), out=gates[:, :3])
        torch.mul(by_hidden, hidden, out=gates[:, 3])
        return None, cell * kept


class _Gru(Cell):
    maps_alike: ClassVar[bool] = False  # the reset gate is between them

    @override
    def activate(self, inputs: Tensor, hidden: Tensor, state: State) -> tuple[State, Tensors]:
        size = 2 * state[0].shape[1]
        new = hidden[:, size:]
        r, z = torch.sigmoid(inputs[:, :size] + hidden[:, :size]).chunk(2, dim=1)
        n = torch.tanh(torch.addcmul(inputs[:, size:], r, new))
        return (torch.addcmul(n, z, state[0] - n),), (r, z, n, new)

    @override
    def slopes(self, activations: Tensors, state: State) -> Tensors:
        r, z, n, new = activations
        of_new = (1 - z) * _of_tanh(n)
        gates = of_new * new * _of_sigmoid(r), (state[0] - n) * _of_sigmoid(z), of_new
        return torch.stack(gates, dim=-2), r, z

    @override
    def back(
        self, slopes: Tensors, arriving: State, to_inputs: Tensor, to_hidden: Tensor
    ) -> tuple[Tensor | None, ...]:
        of_gates, reset, kept = slopes
        torch.mul(of_gates, arriving[0].unsqueeze(1), out=to_inputs.view(len(to_inputs), 3, -1))
        to_hidden.copy_(to_inputs)
        to_hidden.view(len(to_hidden), 3, -1)[:, 2] *= reset
        return (arriving[0] * kept,)


@dataclass(frozen=True)
class _Rnn(Cell):
    """A cell with one gate.

    Attributes:
        activation: What the sum of both maps goes through.
        slope: Derivative of the activation, from its value.
    """

    activation: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]

    @override
    def activate(self, inputs: Tensor, hidden: Tensor, state: State) -> tuple[State, Tensors]:
        following = (self.activation(inputs + hidden),)
        return following, following

    @override
    def slopes(self, activations: Tensors, state: State) -> Tensors:
        return (self.slope(activations[0]),)

    @override
    def back(
        self, slopes: Tensors, arriving: State, to_inputs: Tensor, to_hidden: Tensor
    ) -> tuple[Tensor | None, ...]:
        torch.mul(slopes[0], arriving[0], out=to_hidden)
        return (None,)


def _of_sigmoid(value: Tensor) -> Tensor:
    """Derivative of the sigmoid, from its value."""
    return value - value.square()


def _of_tanh(value: Tensor) -> Tensor:
    """Derivative of the hyperbolic tangent, from its value."""
    return 1 - value.square()


LSTM, GRU = _Lstm(), _Gru()
TANH, RELU = _Rnn(torch.tanh, _of_tanh), _Rnn(torch.relu, torch.sign)


def run_layer(
    cell: Cell, order: range, mapped: Tensor, first: State, weight: Tensor, bias: Tensor | None
) -> Tensors:
    """Runs one layer in one direction.

    Its map of the hidden state is one call of `known_linear`.

    Args:
        cell: What follows the two maps.
        order: Positions in the order of time.
        mapped: Output of the map of the input, of shape ``(positions, samples, gates * features)``.
        first: State before the first position.
        weight: Weight of the map of the hidden state.
        bias: Its bias, or None.

    Returns:
        Hidden states, of shape ``(positions, samples, features)``, and for an LSTM the cell state
        after the last position.

    Example:
        >>> mapped = torch.zeros(2, 1, 3, requires_grad=True)
        >>> (states,) = run_layer(TANH, range(2), mapped, (torch.zeros(1, 3),), torch.eye(3), None)
        >>> torch.autograd.grad(states.sum(), mapped)[0][:, 0].tolist()
        [[2.0, 2.0, 2.0], [1.0, 1.0, 1.0]]
    """
    told, before, maps, slopes = _known(cell, order, mapped.detach(), first, weight, bias)
    hidden = known_linear(before, weight, bias, maps)
    found: Tensors = _Recurrence.apply(
        cell, order, slopes, weight.detach(), told, mapped, hidden, *first
    )
    return found


def _dispatch(cell: Cell, order: range, mapped: Tensor, *others: Any) -> tuple[Tensor]:
    return (mapped,)


@wrap_torch_function(_dispatch)  # so that what it calls is not watched, call by call
@torch.no_grad()
def _known(
    cell: Cell, order: range, mapped: Tensor, first: State, weight: Tensor, bias: Tensor | None
) -> tuple[Tensors, Tensor, Tensor, list[Tensors]]:
    """Goes forward through time.

    Returns:
        What `run_layer` returns. The hidden states before each position, and what the map gives of
        them. The slopes at each position.
    """
    state, steps = first, mapped.unbind()
    after, maps = list(steps), list(steps)
    states: list[State] = [first] * len(steps)
    activations: list[Tensors] = [()] * len(steps)
    for t in order:
        states[t], maps[t] = state, functional.linear(state[0], weight, bias)
        state, activations[t] = cell.activate(steps[t], maps[t], state)
        after[t] = state[0]
    told = torch.stack(after), *state[1:]
    before = tuple(map(torch.stack, zip(*states, strict=True)))
    slopes = cell.slopes(tuple(map(torch.stack, zip(*activations, strict=True))), before)
    return told, before[0], torch.stack(maps), list(zip(*slopes, strict=True))


@wrap_torch_function(lambda *arguments: arguments)
def known_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor) -> Tensor:
    """Puts a linear map whose output is known already into the autograd graph.

    Args:
        inputs: Input of the map, which is given no gradient.
        weight: Weight of shape ``(out, in)``.
        bias: Bias, or None.
        output: What `torch.nn.functional.linear` returns.

    Returns:
        The output.
    """
    found: Tensor = _KnownLinear.apply(inputs, weight, bias, output)
    return found


class _KnownLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (inputs,) = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        to_weight = flat.mT @ inputs.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return None, to_weight, flat.sum(0) if ctx.needs_input_grad[2] else None, None


class _Recurrence(torch.autograd.Function):
    """States as a function of the outputs of both maps at all positions and of the first state.

    All of them are told, and only the way back is computed. The recurrent weight gets no gradient
    here: that is what its map is for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        cell: Cell,
        order: range,
        slopes: Sequence[Tensors],
        weight: Tensor,
        told: Tensors,
        mapped: Tensor,
        hidden: Tensor,
        *first: Tensor,
    ) -> Tensors:
        ctx.cell, ctx.order, ctx.slopes = cell, order, slopes
        # In the layout of the input, so that its gradient need not be copied.
        ctx.layout = mapped.shape, mapped.stride()
        ctx.save_for_backward(weight)
        return told

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_states: Tensor, *last: Tensor) -> tuple[Tensor | None, ...]:
        cell, (weight,) = ctx.cell, ctx.saved_tensors
        to_hidden = to_inputs = to_states.new_empty_strided(*ctx.layout)
        if not cell.maps_alike:
            to_inputs = torch.empty_like(to_hidden)
        state = torch.zeros_like(to_states[0]), *last
        for t in reversed(ctx.order):
            arriving = state[0] + to_states[t], *state[1:]
            direct, *others = cell.back(ctx.slopes[t], arriving, to_inputs[t], to_hidden[t])
            through = to_hidden[t] @ weight.to(to_hidden)
            state = through if direct is None else direct + through, *others
        return None, None, None, None, None, to_inputs, to_hidden, *state
