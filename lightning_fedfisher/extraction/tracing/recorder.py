"""Watches which function calls use which parameters during a forward pass.

All modules end in a handful of functions (`torch.nn.functional.linear`, ``conv2d``, ``layer_norm``,
...). Watching these instead of modules handles alike a module that is called twice, a weight that
two modules share or that is used without its module, and attention and recurrent layers, which
call no submodules. Parameters that are used in any other way are found in the autograd graph
(`edges_to_leaves`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_fedfisher.extraction.layer_types.base import (
    FunctionCall,
    KroneckerLayer,
    LayerType,
    Unfolded,
    take_positions,
)
from lightning_fedfisher.extraction.layer_types.registry import OPENED, read_call
from lightning_fedfisher.extraction.layer_types.spread import Spread
from lightning_fedfisher.extraction.positions import (
    Positions,
    choose_nonzero,
    choose_positions,
    most_positions,
)
from lightning_fedfisher.extraction.tracing.spreading import (
    EXPANSIONS,
    Followed,
    ParameterFollower,
    spread,
)
from lightning_fedfisher.layers import Layer

_SHOWN = 8  # features that show whether a position has a gradient, as a rule


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer in a forward pass, with the gradients that came back to its output.

    Attributes:
        layer_type: What the call computes.
        inputs: Input of the call, of shape ``(samples * frames, ...)``.
        gradients: Gradients at its output, of shape ``(directions, *output.shape)``.

    Example:
        >>> from lightning_fedfisher.extraction.layer_types.linear import Linear
        >>> call = LayerCall(Linear(has_bias=True), torch.ones(4, 2), torch.ones(1, 4, 3))
        >>> call.select(0, 2, samples=4).inputs.shape
        torch.Size([2, 2])
    """

    layer_type: LayerType
    inputs: Tensor
    gradients: Tensor

    def select(self, start: int, stop: int, samples: int) -> LayerCall:
        """Takes a range of samples.

        Args:
            start: First sample.
            stop: The sample after the last.
            samples: Number of samples that the call has.

        Returns:
            The same call of these samples alone.
        """
        frames = len(self.inputs) // samples
        here = slice(start * frames, stop * frames)
        return LayerCall(self.layer_type, self.inputs[here], self.gradients[:, here])

    def at_positions(self, positions: Positions, uniforms: Tensor) -> LayerCall:
        """Takes some positions of each sample, if it has more than wanted.

        Gradients are taken where they are not zero: behind a classifier that reads one token, that
        is a single position.

        Args:
            positions: Most positions of a sample.
            uniforms: A number from 0 to below 1 for each sample, by which they are chosen.

        Returns:
            The same call at these positions, arranged by position.
        """
        layer_type, samples = self.layer_type, len(uniforms)
        assert isinstance(layer_type, KroneckerLayer)
        available = layer_type.count_positions(self.inputs, self.gradients[0]) // samples
        most = most_positions(positions, available)
        if most == available:
            return self
        device = self.inputs.device
        chosen = choose_positions(uniforms, available, most).to(device)
        scale: float | Tensor = math.sqrt(available / most)
        inputs = scale * layer_type.unfold_inputs_at(self.inputs, samples, chosen)
        unfolded = [layer_type.unfold_gradient(gradient, samples) for gradient in self.gradients]
        nonzero = _nonzero(unfolded)
        if not nonzero.all():
            chosen, scales = choose_nonzero(uniforms, nonzero.cpu(), most)
            chosen, scale = chosen.to(device), scales.to(inputs).view(-1, 1, 1)
        found = torch.stack([scale * take_positions(gradient, chosen) for gradient in unfolded])
        return LayerCall(Unfolded(layer_type, available), inputs, found)


def _nonzero(gradients: Sequence[Tensor]) -> Tensor:
    """Finds positions where one of the gradients is not zero, of shape ``(samples, positions)``."""
    some = gradients[0][:, :_SHOWN].any(dim=1)  # which takes no time, and mostly settles it
    if some.all():
        return some
    found = gradients[0].any(dim=1)
    for gradient in gradients[1:]:
        found |= gradient.any(dim=1)
    return found


@dataclass(frozen=True)
class WatchedCall:
    """A function call that is about to be made and that uses parameters of watched layers.

    Attributes:
        func: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        arguments: The same arguments by their meaning.
        layers: Each layer that the call uses, with what it computes for this layer.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    arguments: FunctionCall
    layers: tuple[tuple[Layer, LayerType], ...]

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the layers that the call uses."""
        return tuple(layer.name for layer, _ in self.layers)

    def run(self, replace: Callable[[Any], Any] = lambda argument: argument) -> Any:
        """Makes the call.

        Args:
            replace: Applied to each argument first.

        Returns:
            What the function returns.
        """
        kwargs = {name: replace(value) for name, value in self.kwargs.items()}
        return self.func(*map(replace, self.args), **kwargs)


def run_unwatched(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Makes a call and returns what the function returns."""
    return func(*args, **kwargs)


class LayerCallRecorder(TorchFunctionMode):
    """A context manager that shows every function call inside it to a handler, which makes it.

    Example:
        >>> from lightning_fedfisher.layers import find_layers
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> seen = []
        >>> def note(call):
        ...     seen.append(call.layer_names)
        ...     return call.run()
        >>> with LayerCallRecorder(model, find_layers(model), note):
        ...     _ = model(torch.ones(1, 2))
        >>> seen
        [('0',), ('2',)]
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        on_layer_call: Callable[[WatchedCall], Any],
        on_other_call: Callable[
            [Callable[..., Any], Sequence[Any], Mapping[str, Any]], Any
        ] = run_unwatched,
        spread: Collection[str] = (),
    ) -> None:
        """Learns which parameter belongs to which layer; changes nothing.

        Args:
            model: The model that will be run.
            layers: Layers of the model to watch.
            on_layer_call: Makes a call that uses watched layers, and returns its output.
            on_other_call: Makes any other call, given function and arguments, and returns its
                output. By default nothing else is done.
            spread: Names of layers whose parameters are followed up to where every sample gets a
                copy, which then is a call of theirs.
        """
        super().__init__()
        self._on_layer_call, self._on_other_call = on_layer_call, on_other_call
        parameters = dict(model.named_parameters())
        self._owners = {
            id(parameters[name]): (layer, place)
            for layer in layers
            for place, name in enumerate(layer.parameter_names)
            if layer.name not in spread
        }
        self._spread = {
            id(parameters[name]): (layer, place)
            for layer in layers
            for place, name in enumerate(layer.parameter_names)
            if layer.name in spread
        }
        self._follower = ParameterFollower(
            [p for p in parameters.values() if id(p) in self._spread]
        )

    def forget(self) -> None:
        """Lets go of what was followed in the last forward pass, before the next."""
        self._follower.forget()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func in OPENED:
            with self:
                output = OPENED[func](*args, **kwargs)
            if output is not NotImplemented:
                return output
        arguments = read_call(func, args, kwargs)
        layers = () if arguments is None else self._layers_of(arguments)
        if arguments is not None and layers:
            return self._on_layer_call(WatchedCall(func, args, kwargs, arguments, layers))
        if not self._spread:
            return self._on_other_call(func, args, kwargs)
        if found := self._follower.meets(func, args, kwargs):
            copies = self._on_layer_call(self._spread_call(*found))
            if func in EXPANSIONS:
                return copies
            args, kwargs = apply_to_collection(
                (args, dict(kwargs)), Tensor, lambda t: copies if t is found[0].tensor else t
            )
        result = self._on_other_call(func, args, kwargs)
        self._follower.note(func, args, kwargs, result)
        return result

    def _spread_call(self, followed: Followed, shape: torch.Size) -> WatchedCall:
        """Describes the call that gives every sample its copy of what a parameter has become."""
        parameter, rebuild = followed.parameter, followed.rebuild
        layer, place = self._spread[id(parameter)]
        rows, columns = layer.shape
        start = sum(math.prod(shape) // rows for _, shape in layer.parameters[:place])
        layer_type = Spread(parameter, rebuild, start, columns)
        # Of its inputs, only the shape matters.
        inputs = parameter.detach().new_zeros(()).expand(shape)
        arguments = FunctionCall(inputs, parameter, None, None, None)
        return WatchedCall(
            spread, (parameter, rebuild, shape), {}, arguments, ((layer, layer_type),)
        )

    def _layers_of(self, call: FunctionCall) -> tuple[tuple[Layer, LayerType], ...]:
        """Finds the layers that a call uses as a whole: both parameters of one, or its only one."""
        weight, bias = self._owners.get(id(call.weight)), self._owners.get(id(call.bias))
        if weight and bias and weight[0] is bias[0]:
            if (weight[1], bias[1]) != (0, 1) or call.weight_type is None:
                return ()
            layer_type = call.weight_type(True)
            # A bias of as many entries as the weight has rows is no column of it if these are
            # inputs.
            transposed = isinstance(layer_type, KroneckerLayer) and layer_type.inputs_are_rows
            return () if transposed else ((weight[0], layer_type),)
        used = []
        if weight and call.weight_type is not None and len(weight[0].parameters) == 1:
            used.append((weight[0], call.weight_type(False)))
        if bias and call.bias_type is not None and len(bias[0].parameters) == 1:
            used.append((bias[0], call.bias_type))
        return tuple(used)


def edges_to_leaves(output: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """Walks through an autograd graph and finds every edge that ends in a leaf.

    Args:
        output: The root of the graph.

    Yields:
        The node that an edge comes from, and the leaf tensor that it ends in.

    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> [leaf is weight for _, leaf in edges_to_leaves((2 * weight).sum())]
        [True]
    """
    pending: list[Any] = [output.grad_fn]
    visited: set[Any] = set()
    while pending:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        for following, _ in node.next_functions:
            leaf = getattr(following, "variable", None)
            if leaf is not None:
                yield node, leaf
            pending.append(following)
