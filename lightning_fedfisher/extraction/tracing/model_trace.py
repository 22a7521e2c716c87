"""What a forward pass of a few samples tells: which layers are seen, and where samples are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from typing_extensions import override

from lightning_fedfisher.extraction.layer_types.base import Convolution, LayerType, Linear
from lightning_fedfisher.extraction.layer_types.registry import FunctionCall
from lightning_fedfisher.extraction.tracing.dataflow import Dataflow
from lightning_fedfisher.extraction.tracing.recorder import LayerCallRecorder, edges_to_leaves
from lightning_fedfisher.layers import Layer, Source


@dataclass(frozen=True)
class BatchAxis:
    """Where the samples are in the input of a call.

    Attributes:
        axis: the dimension that runs over samples.
        folded: empty if it runs over samples alone; ``outer`` if over ``samples * frames`` with the
            frames of a sample next to each other, ``inner`` if over ``frames * samples``.
    """

    axis: int
    folded: Literal["", "outer", "inner"] = ""

    def fits(self, tensor: Tensor, samples: int) -> bool:
        """Whether a tensor can have this layout."""
        size = tensor.shape[self.axis] if tensor.ndim > self.axis else 0
        return size % samples == 0 if self.folded else size == samples

    def samples_first(self, tensor: Tensor, samples: int) -> Tensor:
        """The tensor with samples, or ``samples * frames``, in the first dimension."""
        if self.folded == "inner":
            apart = tensor.reshape(-1, samples, *tensor.shape[1:])
            return apart.transpose(0, 1).flatten(0, 1)
        return tensor.movedim(self.axis, 0)


@dataclass(frozen=True)
class ModelTrace:
    """What a forward pass showed.

    Attributes:
        calls: the layers that each call uses, in their order.
        layouts: of each call; None if it is not to be followed.
        operations: of each layer that is fully seen, by layer name, one for each of its calls.
        unseen: why each other layer is not, by layer name.
        unreached: layers that the logits do not depend on.
        plain: layers with one call, whose input has samples first and the weight's precision.
        fed_by: of layers with one call that read another such layer's outputs, by layer name.
        output_layer: name of the layer whose outputs are the logits; empty if there is none.
    """

    calls: tuple[tuple[str, ...], ...]
    layouts: tuple[BatchAxis | None, ...]
    operations: Mapping[str, tuple[LayerType, ...]]
    unseen: Mapping[str, str]
    unreached: tuple[str, ...]
    plain: frozenset[str]
    fed_by: Mapping[str, Source]
    output_layer: str


class ModelTracer(LayerCallRecorder):
    """Finds out, from one forward pass, which layers are fully seen and where samples are."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        """Learns the parameters; changes nothing.

        Args:
            model: all its parameters in question require gradients.
            layers: to watch.
        """
        super().__init__(model, layers)
        self._layers = layers
        self._parameters = dict(model.named_parameters())
        self._calls: list[tuple[FunctionCall, list[tuple[Layer, LayerType]], list[Tensor]]] = []
        self._aliases: set[Node] = set()
        self._flow = Dataflow()
        self._sources: dict[str, Source | None] = {}

    @override
    def _pass_by(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        return self._flow.run(func, args, kwargs)

    @override
    def _follow(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        call: FunctionCall,
        uses: list[tuple[Layer, LayerType]],
    ) -> Any:
        # Views of the parameters: by them, the graph tells this use from others.
        used = {layer.name for layer, _ in uses}
        own = {
            id(p)
            for p in (call.weight, call.bias)
            if id(p) in self._owner and self._owner[id(p)][0].name in used
        }

        def alias(value: Any) -> Any:
            if id(value) not in own:
                return value
            view = value.view_as(value)
            self._aliases.add(view.grad_fn)
            return view

        output = func(*map(alias, args), **{name: alias(value) for name, value in kwargs.items()})
        came_back: list[Tensor] = []
        output.register_hook(came_back.append)
        self._calls.append((call, uses, came_back))
        self._connect(call, uses, output)
        return output

    def _connect(
        self, call: FunctionCall, uses: list[tuple[Layer, LayerType]], output: Tensor
    ) -> None:
        """Notes whose outputs a layer reads, and that these are its own."""
        for layer, operation in uses:
            axis = _channels(operation, call.inputs.ndim)
            again = layer.name in self._sources
            source = None if axis is None or again else self._flow.source(call.inputs, axis)
            self._sources[layer.name] = source
            # With a bias that belongs to another layer, or to none, the outputs are not its own.
            whole = call.bias is None or self._owner.get(id(call.bias), (None, 0))[0] is layer
            if axis is not None and whole:
                self._flow.begin(output, layer.name, axis)

    def survey(self, logits: Tensor) -> ModelTrace:
        """Reads the graph of the forward pass that was watched.

        Args:
            logits: its result, samples first.

        Returns:
            What it showed.
        """
        unseen, unreached = self._used_otherwise(logits)
        if unreached:
            return ModelTrace((), (), {}, unseen, tuple(unreached), frozenset(), {}, "")
        trained = [p for p in self._parameters.values() if p.requires_grad]
        # Any direction that singles out nothing: one sample's gradient shows where it is.
        direction = torch.cos(torch.arange(logits[0].numel(), device=logits.device) + 1.0)
        hits: list[list[Tensor | None]] = []
        for sample in logits:
            for _, _, came_back in self._calls:
                came_back.clear()
            scalar = (sample.flatten() * direction.to(logits)).sum()
            torch.autograd.grad(scalar, trained, allow_unused=True, retain_graph=True)
            hits.append([back[0] != 0 if back else None for _, _, back in self._calls])
        layouts: list[BatchAxis | None] = []
        operations: dict[str, list[LayerType]] = {}
        for place, (call, uses, _) in enumerate(self._calls):
            leading = uses[0][1].leading(call.inputs.ndim)
            layout = _layout(call.inputs.shape[:leading], [hit[place] for hit in hits])
            layouts.append(layout)
            for layer, operation in uses:
                operations.setdefault(layer.name, []).append(operation)
                if layout is None:
                    unseen.setdefault(layer.name, "its samples cannot be told apart")
        for name, found_operations in operations.items():
            if len({type(operation) for operation in found_operations}) > 1:
                unseen.setdefault(name, "it is shared by unlike operations")
        for layer in self._layers:
            if layer.name not in operations:
                unseen.setdefault(layer.name, "no known operation uses it")
        seen = {name: tuple(ops) for name, ops in operations.items() if name not in unseen}
        plain = {
            layer.name
            for (call, uses, _), layout in zip(self._calls, layouts, strict=True)
            for layer, _ in uses
            if layout == BatchAxis(0)
            and len(seen.get(layer.name, ())) == 1
            and call.weight is not None
            and call.weight.dtype == call.inputs.dtype
        }
        calls = tuple(tuple(layer.name for layer, _ in uses) for _, uses, _ in self._calls)
        once = {name for name, operations in seen.items() if len(operations) == 1}
        fed_by = {
            name: source
            for name, source in self._sources.items()
            if source is not None and {name, source.layer} <= once
        }
        head = self._flow.head(logits)
        return ModelTrace(
            calls,
            tuple(layouts),
            seen,
            unseen,
            tuple(unreached),
            frozenset(plain),
            fed_by,
            head if head in once else "",
        )

    def _used_otherwise(self, logits: Tensor) -> tuple[dict[str, str], list[str]]:
        """Layers that the logits depend on by calls not watched, and layers they do not at all."""
        layer_of = {key: layer for key, (layer, _) in self._owner.items()}
        unseen: dict[str, str] = {}
        reached: set[int] = set()
        for node, leaf in edges_to_leaves(logits):
            if id(leaf) in layer_of:
                reached.add(id(leaf))
                if node not in self._aliases:
                    unseen[layer_of[id(leaf)].name] = "it is used by an operation that is not known"
        unreached = [layer.name for leaf, layer in layer_of.items() if leaf not in reached]
        return unseen, list(dict.fromkeys(unreached))


def _channels(operation: LayerType, dimensions: int) -> int | None:
    """The dimension of a call's inputs and outputs that its layer's matrix maps."""
    if isinstance(operation, Linear):
        return dimensions - 1
    return 1 if isinstance(operation, Convolution) else None


def _layout(leading: Sequence[int], hits: Sequence[Tensor | None]) -> BatchAxis | None:
    """Where the samples are in a call's input.

    Args:
        leading: sizes of the dimensions that may run over samples.
        hits: for each sample, where the gradient of its logits at the call's output is not zero.

    Returns:
        The only layout that is possible by the sizes and by every sample; None if there are none or
        several.
    """
    samples = len(hits)
    possible = [BatchAxis(axis) for axis, size in enumerate(leading) if size == samples]
    if leading and leading[0] > samples and leading[0] % samples == 0:
        possible += [BatchAxis(0, "outer"), BatchAxis(0, "inner")]
    for sample, hit in enumerate(hits):
        if hit is not None and len(possible) > 0:
            possible = [layout for layout in possible if _only(layout, hit, sample, samples)]
    return possible[0] if len(possible) == 1 else None


def _only(layout: BatchAxis, hit: Tensor, sample: int, samples: int) -> bool:
    """Whether nothing but one sample's part is hit."""
    first = layout.samples_first(hit, samples)
    frames = len(first) // samples
    mine = first[sample * frames : (sample + 1) * frames]
    return int(mine.sum()) == int(first.sum())
