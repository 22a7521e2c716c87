"""Collects gradients at the outputs of a layer's calls by hooks: the backend of known layers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_fedfisher.extraction.layer_types.base import LayerType
from lightning_fedfisher.extraction.tracing.batch_axis import BatchAxis
from lightning_fedfisher.extraction.tracing.model_trace import ModelTrace
from lightning_fedfisher.extraction.tracing.recorder import (
    LayerCall,
    LayerCallRecorder,
    WatchedCall,
    edges_to_leaves,
)
from lightning_fedfisher.layers import Layer

Deliver = Callable[[Layer, Sequence[LayerCall]], None]

_DIFFERENT = (
    "forward passes of different batches call different layers, or in another order: which samples "
    "a layer has seen cannot be told"
)
# Names of the layers that a call uses, and how many calls before it use the same ones.
CallPlace = tuple[tuple[str, ...], int]
# What came back to the calls of one layer: what each computes, its input, and a gradient for each
# direction so far.
_Arrived = dict[CallPlace, tuple[LayerType, Tensor, list[Tensor]]]


class DifferentCallsError(ValueError):
    """Says that a forward pass is not as the one that was traced.

    Attributes:
        layers: Names of layers that it used and the traced one did not, or the other way round;
            empty if the difference is another.
    """

    def __init__(self, message: str, layers: Iterable[str] = ()) -> None:
        """Writes the message.

        Args:
            message: What is different.
            layers: Names of layers that only one of the two passes used.
        """
        super().__init__(message)
        self.layers = frozenset(layers)


class OutputGradients:
    """Gives the calls of each layer with their gradients, as soon as a backward pass has them.

    Example:
        >>> from lightning_fedfisher.extraction.tracing import ModelTracer
        >>> from lightning_fedfisher.layers import find_layers
        >>> model, batch = nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> layers = find_layers(model)
        >>> tracer = ModelTracer(model, layers)
        >>> with tracer.watch():
        ...     trace = tracer.trace(model(batch))
        >>> collector = OutputGradients(model, layers, trace, lambda layer, calls: print(calls))
        >>> with collector.watch():
        ...     logits = model(batch)
        >>> collector.backward(logits, [torch.tensor([[1.0], [5.0]])])
        [LayerCall(layer_type=Linear(has_bias=True), inputs=tensor([[1., 2.],
                [3., 4.]]), gradients=tensor([[[1.],
                 [5.]]]))]
    """

    _differentiates: ClassVar[bool] = True

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], trace: ModelTrace, deliver: Deliver
    ) -> None:
        """Takes the parameters out of the autograd graph.

        Args:
            model: A copy of the model. Its parameters stop requiring gradients.
            layers: Layers of the model. Those in `trace.layer_types` are collected.
            trace: What a traced forward pass showed about the model.
            deliver: Called with each layer and its calls, once for each `backward`.
        """
        # Gradients at the outputs are all that is needed. Gradients of the weights would be a third
        # of the work of a training step.
        model.requires_grad_(False)
        for layer in layers if self._differentiates else ():
            if layer.name in trace.spread:  # whose way tells what is detached from them
                for name in layer.parameter_names:
                    model.get_parameter(name).requires_grad_()
        self._recorder = LayerCallRecorder(model, layers, self._on_layer_call, spread=trace.spread)
        parameters = dict(model.named_parameters())
        self._dtypes = {layer.name: parameters[layer.parameter_names[0]].dtype for layer in layers}
        self._trace = trace
        self._deliver = deliver
        # Of the calls that use the same layers, in the order of the first of them: their axes.
        self._axes: dict[tuple[str, ...], list[BatchAxis | None]] = {}
        for names, batch_axis in zip(trace.calls, trace.batch_axes, strict=True):
            self._axes.setdefault(names, []).append(batch_axis)
        self._order = list(self._axes)
        # What is said about these is that they are called once.
        self._once = {trace.output_layer, *trace.fed_by}
        self._once.update(source.layer for source in trace.fed_by.values())
        self._forget()

    def watch(self) -> LayerCallRecorder:
        """Forgets the last forward pass, and gives the context manager to run the next one in."""
        self._forget()
        return self._recorder

    def backward(self, logits: Tensor, directions: Sequence[Tensor]) -> None:
        """Back-propagates directions through the forward pass that was just watched.

        Args:
            logits: Its result, samples first.
            directions: Gradients at the logits, each of their shape. Each takes a backward pass.

        Raises:
            DifferentCallsError: If the forward pass did not call the same layers as the traced one.
        """
        self._require_same_calls()
        self._samples, self._directions = len(logits), len(directions)
        leaves = list({id(leaf): leaf for _, leaf in edges_to_leaves(logits)}.values())
        if self._expected and not leaves:  # detached since the trace
            raise DifferentCallsError(_DIFFERENT)
        for index, direction in enumerate(directions if leaves else ()):
            # Only the hooks that run on the way matter, and not the result.
            torch.autograd.grad(
                logits,
                leaves,
                direction,
                retain_graph=index + 1 < len(directions),
                allow_unused=True,
            )
        for layer, arrived in self._arrived.values():  # no gradient reaches some of their calls
            self._deliver(layer, _layer_calls(arrived, self._samples))
        self._forget()

    def _require_same_calls(self) -> None:
        """Refuses a forward pass that called fewer layers than the traced one."""
        if missing := self._axes.keys() - self._calls.keys():
            raise DifferentCallsError(_DIFFERENT, itertools.chain(*missing))
        if uneven := [
            names
            for names, count in self._calls.items()
            if count != len(self._axes[names]) and self._is_fixed(names)
        ]:
            raise DifferentCallsError(_DIFFERENT, itertools.chain(*uneven))

    def _forget(self) -> None:
        """Starts anew, before a forward pass."""
        self._recorder.forget()
        self._calls: Counter[tuple[str, ...]] = Counter()  # so far, by the layers they use
        self._expected: dict[str, int] = {}  # calls of each layer
        self._arrived: dict[str, tuple[Layer, _Arrived]] = {}
        self._complete: dict[str, int] = {}  # gradients of each layer
        self._samples = self._directions = 0

    def _on_layer_call(self, call: WatchedCall) -> Any:
        """Makes a call, and hooks its output if it is one to be collected."""
        output, place = call.run(), (call.layer_names, self._calls[call.layer_names])
        batch_axis = self._next_axis(call.layer_names)
        layers = [
            (layer, layer_type)
            for layer, layer_type in call.layers
            if layer.name in self._trace.layer_types
        ]
        if batch_axis is None or not layers:
            return output
        for layer, _ in layers:
            self._expected[layer.name] = self._expected.get(layer.name, 0) + 1
        return self._follow(place, batch_axis, call.arguments.inputs.detach(), layers, output)

    def _follow(
        self,
        place: CallPlace,
        batch_axis: BatchAxis,
        inputs: Tensor,
        layers: Sequence[tuple[Layer, LayerType]],
        output: Tensor,
    ) -> Tensor:
        """Hooks the output of a call, and returns it."""
        if not output.requires_grad:
            # A clone, because an in-place activation must not write to a leaf.
            output = output.detach().requires_grad_().clone()
        # On the tensor rather than on the module, so that the gradient is the one at the output
        # before any change in place.
        output.register_hook(  # type: ignore[no-untyped-call]
            partial(self._arrive, place, batch_axis, inputs, layers)
        )
        return output

    def _next_axis(self, names: tuple[str, ...]) -> BatchAxis | None:
        """Counts a call, and finds where its samples are: as in the traced calls of its layers."""
        count, known = self._calls[names], len(self._calls)
        if count == 0 and self._order[known : known + 1] != [names]:
            # Either those before it in the order were left out, or it is called too often.
            skipped = self._order[known : self._order.index(names)] if names in self._axes else []
            raise DifferentCallsError(_DIFFERENT, itertools.chain(*(skipped or [names])))
        self._calls[names] += 1
        axes = self._axes[names]
        if count < len(axes):
            return axes[count]
        if self._is_fixed(names):
            raise DifferentCallsError(_DIFFERENT, names)
        return axes[0]

    def _is_fixed(self, names: tuple[str, ...]) -> bool:
        """Tells whether the number of calls must be the traced one.

        It need not be if all of them have their samples at the same place: a recurrent cell is
        called once for each position, and sequences are longer in one batch than in another.
        """
        axes = set(self._axes[names])
        # Calls whose samples are not known are not collected at all.
        return None not in axes and (len(axes) > 1 or not self._once.isdisjoint(names))

    def _arrive(
        self,
        place: CallPlace,
        batch_axis: BatchAxis,
        inputs: Tensor,
        layers: Sequence[tuple[Layer, LayerType]],
        gradient: Tensor,
    ) -> None:
        """Takes a gradient at the output of a call, and delivers layers that have all of theirs."""
        if not batch_axis.fits(inputs, self._samples):
            names = ", ".join(layer.name for layer, _ in layers)
            raise DifferentCallsError(
                f"the input of {names} has shape {tuple(inputs.shape)} for {self._samples} "
                "samples: its samples were found elsewhere in the first batch",
                (layer.name for layer, _ in layers),
            )
        inputs = batch_axis.samples_first(inputs, self._samples)
        gradient = batch_axis.samples_first(gradient, self._samples)
        for layer, layer_type in layers:
            dtype = self._dtypes[layer.name]
            # Of lower precision where the model opens autocast itself.
            read = inputs.to(dtype) if inputs.is_floating_point() else inputs
            _, arrived = self._arrived.setdefault(layer.name, (layer, {}))
            _, _, gradients = arrived.setdefault(place, (layer_type, read, []))
            gradients.append(gradient.to(dtype))
            complete = self._complete.get(layer.name, 0) + 1
            self._complete[layer.name] = complete
            if complete == self._expected[layer.name] * self._directions:
                self._deliver(layer, _layer_calls(arrived, self._samples))
                del self._arrived[layer.name]


def _layer_calls(arrived: _Arrived, samples: int) -> list[LayerCall]:
    """Puts the gradients of each call together, and then calls of the same form.

    Few large products take less time than the many small ones of a recurrent layer.
    """
    alike: dict[tuple[LayerType, torch.Size], list[tuple[Tensor, Tensor]]] = {}
    for layer_type, inputs, gradients in arrived.values():
        both = inputs, gradients[0].unsqueeze(0) if len(gradients) == 1 else torch.stack(gradients)
        alike.setdefault((layer_type, inputs.shape), []).append(both)
    return [
        LayerCall(
            layer_type,
            _join([inputs for inputs, _ in calls], samples, dim=0),
            _join([gradients for _, gradients in calls], samples, dim=1),
        )
        for (layer_type, _), calls in alike.items()
    ]


def _join(tensors: Sequence[Tensor], samples: int, dim: int) -> Tensor:
    """Joins the frames of each sample, which are next to each other in one dimension."""
    if len(tensors) == 1:
        return tensors[0]
    apart = [torch.unflatten(tensor, dim, (samples, -1)) for tensor in tensors]
    return torch.cat(apart, dim + 1).flatten(dim, dim + 1)
