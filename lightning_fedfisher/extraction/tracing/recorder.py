"""Which calls use which parameters in a forward pass, seen from the functions themselves.

Modules end in a handful of functions (`torch.nn.functional.linear`, ``conv2d``, ``layer_norm``,
...), and these are watched instead of the modules: so a module called twice, a weight shared by two
modules or used without its module, and attention that calls no submodule, are all seen alike.
What is not seen is noticed, from the graph, and left to another way (see `functional_gradients`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_fedfisher.extraction.layer_types.base import LayerType
from lightning_fedfisher.extraction.layer_types.registry import (
    FunctionCall,
    open_attention,
    read_call,
)
from lightning_fedfisher.layers import Layer


@dataclass(frozen=True)
class LayerCall:
    """One use of a layer in a forward pass, with the gradient that came back.

    Attributes:
        operation: what the call does.
        inputs: of the call, samples first.
        gradient: those that came back to its output, ``(directions, *output.shape)``.
    """

    operation: LayerType
    inputs: Tensor
    gradient: Tensor

    def part(self, start: int, stop: int, samples: int) -> LayerCall:
        """The use by some of the samples."""
        frames = len(self.inputs) // samples
        here = slice(start * frames, stop * frames)
        return LayerCall(self.operation, self.inputs[here], self.gradient[:, here])


class LayerCallRecorder(TorchFunctionMode):
    """Watches the calls of one forward pass after another.

    A context manager: calls inside it are watched.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        """Learns the parameters; changes nothing.

        Args:
            model: the model to run.
            layers: to watch, with their parameters' names.
        """
        super().__init__()
        parameters = dict(model.named_parameters())
        self._owner = {
            id(parameters[name]): (layer, place)
            for layer in layers
            for place, name in enumerate(layer.parameter_names)
        }

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward:
            with self:
                return open_attention(*args, **kwargs)
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        call = read_call(func, args, kwargs)
        uses = [] if call is None else self._uses(call)
        if call is None or not uses:
            return self._pass_by(func, args, kwargs)
        return self._follow(func, args, kwargs, call, uses)

    def _pass_by(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Makes a call that uses no layer, and returns its output."""
        return func(*args, **kwargs)

    def _uses(self, call: FunctionCall) -> list[tuple[Layer, LayerType]]:
        weight, bias = self._owner.get(id(call.weight)), self._owner.get(id(call.bias))
        if weight and bias and weight[0] is bias[0]:
            if (weight[1], bias[1]) == (0, 1) and call.operation is not None:
                return [(weight[0], call.operation(True))]
            return []
        uses = []
        if weight and call.operation is not None and len(weight[0].parameters) == 1:
            uses.append((weight[0], call.operation(False)))
        if bias and call.shift is not None and len(bias[0].parameters) == 1:
            uses.append((bias[0], call.shift))
        return uses

    @abstractmethod
    def _follow(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        call: FunctionCall,
        uses: list[tuple[Layer, LayerType]],
    ) -> Any:
        """Makes a call that uses layers, and returns its output."""


def edges_to_leaves(output: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """Every edge of a graph that ends in a leaf.

    Args:
        output: the root of the graph.

    Yields:
        The node the edge comes from, and the leaf.
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
