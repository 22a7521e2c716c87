"""Learns about a model from one forward pass of a few samples: which calls use which layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from lightning_fedfisher.errors import UnsupportedModelError
from lightning_fedfisher.extraction.layer_types.base import LayerType, are_alike
from lightning_fedfisher.extraction.layer_types.spread import Spread
from lightning_fedfisher.extraction.tracing.batch_axis import BatchAxis, possible_batch_axes
from lightning_fedfisher.extraction.tracing.dataflow import Dataflow
from lightning_fedfisher.extraction.tracing.recorder import (
    LayerCallRecorder,
    WatchedCall,
    edges_to_leaves,
)
from lightning_fedfisher.layers import Layer, Source

_NEARLY = 1e-3  # 1, of probabilities that are clamped or rounded
_UNREACHED = "no gradient reaches it from the logits, so that a merge averages it"
_NOT_ITS_OWN = (
    "the forward pass of the module's copy uses parameters that are not the copy's own: of a "
    "function that is tied to the original, or of a module that is not registered as a part; "
    "define forward in the class and keep all that is trained in attributes of the module"
)
_VARYING = "only some batches use it"
_RESHAPES = (
    *("View", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze", "ToCopy", "Clone", "Alias", "Clamp"),
    *("Slice", "Select", "Permute", "Transpose", "TBackward", "Cat", "Stack"),
)


@dataclass(frozen=True)
class ModelTrace:
    """What a forward pass showed about a model.

    Attributes:
        calls: Names of the layers that each call uses, call by call in the order of the pass.
        batch_axes: Where the samples are in the input of each call. None if that is not known, and
            the call is therefore of no use.
        layer_types: By name of each layer whose calls are all understood, what each of them
            computes.
        unseen: By name of each other layer, why its calls are not understood.
        unreached: By name of each layer that the logits do not depend on, why. The rest of the
            trace says nothing about these.
        uncalled: Names of those among them that nothing was seen to use. Another batch may use
            them, as one that is sent to another expert.
        plain: Names of layers that are called once, on an input that has its samples in the first
            dimension and the precision of the weight.
        fed_by: By name of a layer that is called once and reads the outputs of another such layer,
            that other layer.
        output_layer: Name of the layer whose outputs are the logits. Empty if there is none.
        spread: Names of layers whose parameters were followed up to where every sample gets a copy.
        varying: Names of layers that only some batches use.
        last_operation: Name of the operation that the logits come from, as autograd calls it, but
            for those that bring them into another form.
        sums_to_one: Whether the logits of each sample are probabilities by their values.
    """

    calls: tuple[tuple[str, ...], ...] = ()
    batch_axes: tuple[BatchAxis | None, ...] = ()
    layer_types: Mapping[str, tuple[LayerType, ...]] = field(default_factory=dict)
    unseen: Mapping[str, str] = field(default_factory=dict)
    unreached: Mapping[str, str] = field(default_factory=dict)
    uncalled: frozenset[str] = frozenset()
    plain: frozenset[str] = frozenset()
    fed_by: Mapping[str, Source] = field(default_factory=dict)
    output_layer: str = ""
    spread: frozenset[str] = frozenset()
    varying: frozenset[str] = frozenset()
    last_operation: str = ""
    sums_to_one: bool = False

    @property
    def spreadable(self) -> frozenset[str]:
        """Names of layers whose parameters may be copied to every sample.

        Those whose calls are not understood, unless one of them has samples in its input: its
        output is no copy, and what else the layer does is of no help.
        """
        calls = zip(self.calls, self.batch_axes, strict=True)
        return frozenset(self.unseen).difference(*(names for names, axis in calls if axis))

    def with_varying(self, varying: Collection[str]) -> ModelTrace:
        """Gives the trace of a model some of whose layers are used by some batches only.

        Args:
            varying: Names of these layers.

        Returns:
            A trace in which their calls are not understood, nor those of layers that share one.
        """
        varying, known = set(varying), 0
        while len(varying) != known:
            known = len(varying)
            varying.update(*(names for names in self.calls if not varying.isdisjoint(names)))
        calls = [
            (names, axis)
            for names, axis in zip(self.calls, self.batch_axes, strict=True)
            if varying.isdisjoint(names)
        ]
        return replace(
            self,
            calls=tuple(names for names, _ in calls),
            batch_axes=tuple(axis for _, axis in calls),
            layer_types={n: t for n, t in self.layer_types.items() if n not in varying},
            unseen=dict(self.unseen) | dict.fromkeys(sorted(varying), _VARYING),
            unreached={n: why for n, why in self.unreached.items() if n not in varying},
            uncalled=self.uncalled - varying,
            plain=self.plain - varying,
            fed_by={
                name: source
                for name, source in self.fed_by.items()
                if varying.isdisjoint((name, source.layer))
            },
            output_layer="" if self.output_layer in varying else self.output_layer,
            spread=self.spread - varying,
            varying=self.varying | varying,
        )


class ModelTracer:
    """Traces one forward pass of a model.

    Example:
        >>> from lightning_fedfisher.layers import find_layers
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> tracer = ModelTracer(model, find_layers(model))
        >>> with tracer.watch():
        ...     logits = model(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> trace = tracer.trace(logits)
        >>> trace.calls, trace.output_layer
        ((('0',), ('2',)), '2')
        >>> trace.fed_by["2"]
        Source(layer='0', activation='relu')
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], spread: frozenset[str] = frozenset()
    ) -> None:
        """Learns which parameters belong to which layer; changes nothing.

        Args:
            model: The model. The parameters of `layers` require gradients.
            layers: Layers of the model to watch.
            spread: Names of those whose parameters are followed up to where every sample gets a
                copy, because no function is known to read them.
        """
        self._model, self._layers, self._spread = model, layers, spread
        self._parameters = dict(model.named_parameters())
        self._owners = {
            id(self._parameters[name]): layer for layer in layers for name in layer.parameter_names
        }
        self._dataflow = Dataflow()
        # Each call of the pass, with the place of its output in the graph.
        self._calls: list[tuple[WatchedCall, GradientEdge]] = []
        self._aliases: set[Node] = set()
        self._sources: dict[str, Source | None] = {}

    def watch(self) -> LayerCallRecorder:
        """Gives the context manager inside which the forward pass must run, once."""
        # Not kept: the graph of the pass would live on in a cycle of references.
        return LayerCallRecorder(
            self._model, self._layers, self._on_layer_call, self._dataflow.run, self._spread
        )

    def trace(self, logits: Tensor) -> ModelTrace:
        """Describes the forward pass that was watched.

        Runs one backward pass for each sample.

        Args:
            logits: Result of the forward pass, samples first, in the autograd graph.

        Returns:
            What the pass showed.
        """
        unseen, unreached = self._used_otherwise(logits)
        if unreached:
            called = {name for call, _ in self._calls for name in call.layer_names}
            return ModelTrace(
                unseen={name: why for name, why in unseen.items() if name not in unreached},
                unreached=dict.fromkeys(unreached, _UNREACHED),
                uncalled=frozenset(unreached) - called,
            )
        batch_axes = self._find_batch_axes(logits)
        found: dict[str, list[LayerType]] = {}
        for (call, _), batch_axis in zip(self._calls, batch_axes, strict=True):
            for layer, layer_type in call.layers:
                found.setdefault(layer.name, []).append(layer_type)
                if batch_axis is None:
                    unseen.setdefault(layer.name, "its samples cannot be told apart")
        several = {layer.name for layer in self._layers if len(layer.parameters) > 1}
        for name, types in found.items():
            # Of a weight and its bias, an operation may use either alone.
            if name in several and not are_alike(types):
                unseen.setdefault(name, "it is shared by unlike operations")
        for layer in self._layers:
            if layer.name not in found:
                unseen.setdefault(layer.name, "no known operation uses it")
        layer_types = {
            # A trace may be kept for long, and must keep nothing of the model alive.
            name: tuple(t.forgotten() if isinstance(t, Spread) else t for t in types)
            for name, types in found.items()
            if name not in unseen
        }
        once = {name for name, types in layer_types.items() if len(types) == 1}
        plain = {
            name
            for (call, _), batch_axis in zip(self._calls, batch_axes, strict=True)
            for name in call.layer_names
            if name in once and batch_axis == BatchAxis(0) and _has_precision_of_weight(call)
        }
        fed_by = {
            name: source
            for name, source in self._sources.items()
            if source is not None and {name, source.layer} <= once
        }
        output_layer = self._dataflow.find_output_layer(logits)
        return ModelTrace(
            calls=tuple(call.layer_names for call, _ in self._calls),
            batch_axes=batch_axes,
            layer_types=layer_types,
            unseen=unseen,
            plain=frozenset(plain),
            fed_by=fed_by,
            output_layer=output_layer if output_layer in once else "",
            spread=self._spread,
            last_operation=_last_operation(logits),
            sums_to_one=_sums_to_one(logits.detach()),
        )

    def _on_layer_call(self, call: WatchedCall) -> Any:
        """Makes a call on views of its parameters, and notes where its output is in the graph."""
        used = {layer.name for layer, _ in call.layers}
        owned = {
            id(parameter)
            for parameter in (call.arguments.weight, call.arguments.bias)
            if (owner := self._owners.get(id(parameter))) is not None and owner.name in used
        }

        def alias(argument: Any) -> Any:
            if id(argument) not in owned:
                return argument
            # In the graph, the view tells this use of the parameter from uses that are not watched.
            view = argument.view_as(argument)
            self._aliases.add(view.grad_fn)
            return view

        output = call.run(alias)
        # Not the output itself, which may be changed in place.
        self._calls.append((call, get_gradient_edge(output)))
        self._connect(call, output)
        return output

    def _connect(self, call: WatchedCall, output: Tensor) -> None:
        """Notes whose outputs a call reads, and that what it returns are outputs of its layer."""
        inputs, bias = call.arguments.inputs, call.arguments.bias
        for layer, layer_type in call.layers:
            axis = layer_type.channel_axis(inputs.ndim)
            again = layer.name in self._sources
            source = None if axis is None or again else self._dataflow.find_source(inputs, axis)
            self._sources[layer.name] = source
            # With a bias that belongs to another layer, or to none, the outputs are not its own.
            whole = bias is None or self._owners.get(id(bias)) is layer
            if axis is not None and whole:
                self._dataflow.mark_output(output, layer.name, axis)

    def _find_batch_axes(self, logits: Tensor) -> tuple[BatchAxis | None, ...]:
        """Finds where the samples are in the input of each call."""
        # A combination of the logits in which no terms cancel: the gradient of one sample's then
        # reaches every place that belongs to the sample.
        direction = torch.cos(torch.arange(logits[0].numel(), device=logits.device) + 1.0)
        hits: list[list[Tensor | None]] = [[] for _ in self._calls]
        edges = [edge for _, edge in self._calls]
        for sample in logits if edges else ():
            scalar = (sample.flatten() * direction.to(logits)).sum()
            # Gradients of the weights are not needed, and not computed.
            gradients = torch.autograd.grad(scalar, edges, allow_unused=True, retain_graph=True)
            for hit, gradient in zip(hits, gradients, strict=True):
                hit.append(None if gradient is None else gradient != 0)
        found: list[BatchAxis | None] = []
        for hit, (call, edge) in zip(hits, self._calls, strict=True):
            shape = call.arguments.inputs.shape
            _, layer_type = call.layers[0]
            axes = possible_batch_axes(shape[: layer_type.sample_axes(len(shape))], hit)
            if len(axes) > 1:
                known = [(edges[i], axis) for i, axis in enumerate(found) if axis is not None]
                axes = [axis for axis in axes if _reads_one_sample(edge, hit, axis, known)]
            found.append(axes[0] if len(axes) == 1 else None)
        return tuple(found)

    def _used_otherwise(self, logits: Tensor) -> tuple[dict[str, str], tuple[str, ...]]:
        """Finds layers used by calls that were not watched, and layers that logits do not need."""
        unseen: dict[str, str] = {}
        reached: set[int] = set()
        own = {id(parameter) for parameter in self._parameters.values()}
        for node, leaf in edges_to_leaves(logits):
            owner = self._owners.get(id(leaf))
            if isinstance(leaf, nn.Parameter) and id(leaf) not in own:
                raise UnsupportedModelError([_NOT_ITS_OWN])
            if owner is not None:
                reached.add(id(leaf))
                if node not in self._aliases:
                    unseen[owner.name] = "it is used by an operation that is not known"
        unreached = tuple(
            layer.name
            for layer in self._layers
            if any(id(self._parameters[name]) not in reached for name in layer.parameter_names)
        )
        return unseen, unreached


def _sums_to_one(logits: Tensor) -> bool:
    """Tells whether all values are of [0, 1] and sum to 1 over the second dimension."""
    if logits.ndim < 2 or logits.shape[1] < 2 or not ((logits >= 0) & (logits <= 1)).all():
        return False
    return bool(((logits.double().sum(1) - 1).abs() < _NEARLY).all())


def _last_operation(logits: Tensor) -> str:
    """Name of the operation that a tensor comes from, but for changes of its shape."""
    node: Any = logits.grad_fn
    while node is not None and node.name().startswith(_RESHAPES):
        node = node.next_functions[0][0]
    return "" if node is None else str(node.name())


def _reads_one_sample(
    edge: GradientEdge,
    hits: Sequence[Tensor | None],
    axis: BatchAxis,
    known: Sequence[tuple[GradientEdge, BatchAxis]],
) -> bool:
    """Tells whether what would be the first sample's part of a call comes from that sample alone.

    The gradient of the logits may reach too few places to tell, such as the last position of each
    sample. What these and all other places were computed from tells more.

    Args:
        edge: Place of the call's output in the graph.
        hits: For each sample, where the gradient of its logits reaches the output, or None.
        axis: Where the samples may be.
        known: Calls before, each with where its samples are.
    """
    like = next((hit for hit in hits if hit is not None), None)
    if like is None or not known:
        return False
    part = torch.zeros_like(like, dtype=torch.get_default_dtype())
    first = axis.first_sample(part, len(hits))
    # As above, no terms cancel.
    first += torch.cos(torch.arange(first.numel(), device=first.device) + 1.0).view(first.shape)
    edges = [place for place, _ in known]
    found = torch.autograd.grad([edge], edges, [part], allow_unused=True, retain_graph=True)
    reached = [
        (gradient != 0, there)
        for gradient, (_, there) in zip(found, known, strict=True)
        if gradient is not None
    ]
    return any(bool(hit.any()) for hit, _ in reached) and all(
        there.hits_only(hit, 0, len(hits)) for hit, there in reached
    )


def _has_precision_of_weight(call: WatchedCall) -> bool:
    """Tells whether a call has a weight, of the same precision as its input."""
    weight = call.arguments.weight
    return weight is not None and weight.dtype == call.arguments.inputs.dtype
