"""Gradients at the outputs of watched calls, delivered layer by layer while they come back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_fedfisher.extraction.layer_types.base import LayerType
from lightning_fedfisher.extraction.layer_types.registry import FunctionCall
from lightning_fedfisher.extraction.tracing.model_trace import BatchAxis, ModelTrace
from lightning_fedfisher.extraction.tracing.recorder import (
    LayerCall,
    LayerCallRecorder,
    edges_to_leaves,
)
from lightning_fedfisher.layers import Layer

Deliver = Callable[[Layer, Sequence[LayerCall]], None]

_DIFFERENT = (
    "forward passes of different batches call different layers, or in another order: which samples "
    "a layer has seen cannot be told"
)
_Arrived = dict[int, tuple[LayerType, Tensor, list[Tensor]]]  # by the call's place


def _uses(arrived: _Arrived) -> list[LayerCall]:
    """Uses whose gradients are complete, or that no further gradient reaches."""
    return [
        LayerCall(operation, inputs, torch.stack(gradients))
        for operation, inputs, gradients in arrived.values()
    ]


class GradientCollector(LayerCallRecorder):
    """Delivers every layer's uses with the gradients of a backward pass, as soon as complete."""

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], survey: ModelTrace, deliver: Deliver
    ) -> None:
        """Takes the parameters out of the graph.

        Args:
            model: a throw-away copy: its parameters stop requiring gradients.
            layers: of the model; those that the survey saw fully are collected.
            survey: of the same model.
            deliver: called with each layer and its uses, once for each backward pass.
        """
        super().__init__(model, layers)
        # Gradients at the outputs are all that is needed: back-propagation to the weights is
        # a third of the work of a training step, and is never asked for.
        model.requires_grad_(False)
        self._dtype = next(model.parameters()).dtype
        self._expected_calls, self._layouts = survey.calls, survey.layouts
        self._seen = survey.operations.keys()
        self._deliver = deliver
        self.anew()

    def anew(self) -> Self:
        """Forgets the last forward pass; to be entered for the next."""
        self._calls = 0
        self._expected: dict[str, int] = {}
        self._arrived: dict[str, tuple[Layer, _Arrived]] = {}
        self._complete: dict[str, int] = {}
        self._samples = self._directions = 0
        return self

    def backward(self, logits: Tensor, directions: Sequence[Tensor]) -> None:
        """Back-propagates directions through the forward pass just watched, one by one.

        Args:
            logits: its result, samples first.
            directions: of the logits' shape.
        """
        if self._calls != len(self._layouts):
            raise ValueError(_DIFFERENT)
        self._samples, self._directions = len(logits), len(directions)
        leaves = _leaves(logits)
        for index, direction in enumerate(directions if leaves else ()):
            # The result is not looked at: the hooks that run on the way collect what is needed.
            torch.autograd.grad(
                logits,
                leaves,
                direction,
                retain_graph=index + 1 < len(directions),
                allow_unused=True,
            )
        for layer, uses in self._arrived.values():  # no gradient reaches some of their uses
            self._deliver(layer, _uses(uses))
        self.anew()

    @override
    def _follow(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        call: FunctionCall,
        uses: list[tuple[Layer, LayerType]],
    ) -> Any:
        output = func(*args, **kwargs)
        names = tuple(layer.name for layer, _ in uses)
        if self._expected_calls[self._calls : self._calls + 1] != (names,):
            raise ValueError(_DIFFERENT)
        layout, place = self._layouts[self._calls], self._calls
        self._calls += 1
        uses = [(layer, operation) for layer, operation in uses if layer.name in self._seen]
        if layout is None or not uses:
            return output
        if not output.requires_grad:
            # A clone, because an in-place activation must not write to a leaf.
            output = output.detach().requires_grad_().clone()
        for layer, _ in uses:
            self._expected[layer.name] = self._expected.get(layer.name, 0) + 1
        inputs = call.inputs.detach()
        # On the tensor rather than the module: it then sees the gradient before any in-place
        # change of the output.
        output.register_hook(partial(self._arrive, place, layout, inputs, uses))
        return output

    def _arrive(
        self,
        place: int,
        layout: BatchAxis,
        inputs: Tensor,
        uses: list[tuple[Layer, LayerType]],
        gradient: Tensor,
    ) -> None:
        if not layout.fits(inputs, self._samples):
            names = ", ".join(layer.name for layer, _ in uses)
            raise ValueError(
                f"the input of {names} has shape {tuple(inputs.shape)} for {self._samples} "
                "samples: its samples were found elsewhere in the first batch"
            )
        inputs = layout.samples_first(inputs, self._samples)
        gradient = layout.samples_first(gradient, self._samples).to(self._dtype)
        if inputs.is_floating_point():  # in less where the model opens autocast itself
            inputs = inputs.to(self._dtype)
        for layer, operation in uses:
            _, arrived = self._arrived.setdefault(layer.name, (layer, {}))
            _, _, gradients = arrived.setdefault(place, (operation, inputs, []))
            gradients.append(gradient)
            done = self._complete.get(layer.name, 0) + 1
            self._complete[layer.name] = done
            if done == self._expected[layer.name] * self._directions:
                self._deliver(layer, _uses(arrived))
                del self._arrived[layer.name]


def _leaves(output: Tensor) -> list[Tensor]:
    """What a tensor depends on at the start of its graph."""
    return list({id(leaf): leaf for _, leaf in edges_to_leaves(output)}.values())
