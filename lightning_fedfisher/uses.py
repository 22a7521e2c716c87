"""Which calls use which parameters in a forward pass, seen from the functions themselves.

Modules end in a handful of functions (`torch.nn.functional.linear`, ``conv2d``, ``layer_norm``,
...), and these are watched instead of the modules: so a module called twice, a weight shared by two
modules or used without its module, and attention that calls no submodule, are all seen alike.
What is not seen is noticed, from the graph, and left to another way (see `functional_gradients`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_fedfisher.calls import Call, open_attention, read_call
from lightning_fedfisher.layers import Layer
from lightning_fedfisher.operations import Operation

Deliver = Callable[[Layer, Sequence["Use"]], None]


@dataclass(frozen=True)
class Use:
    """One use of a layer in a forward pass, with the gradient that came back.

    Attributes:
        operation: what the call does.
        inputs: of the call, samples first.
        gradient: those that came back to its output, ``(directions, *output.shape)``.
    """

    operation: Operation
    inputs: Tensor
    gradient: Tensor

    def part(self, start: int, stop: int, samples: int) -> Use:
        """The use by some of the samples."""
        frames = len(self.inputs) // samples
        here = slice(start * frames, stop * frames)
        return Use(self.operation, self.inputs[here], self.gradient[:, here])


@dataclass(frozen=True)
class Layout:
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
class Survey:
    """What a forward pass showed.

    Attributes:
        calls: the layers that each call uses, in their order.
        layouts: of each call; None if it is not to be followed.
        operations: of each layer that is fully seen, by layer name, one for each of its calls.
        unseen: why each other layer is not, by layer name.
        unreached: layers that the logits do not depend on.
        plain: layers with one call, on one row for each sample, by name.
    """

    calls: tuple[tuple[str, ...], ...]
    layouts: tuple[Layout | None, ...]
    operations: Mapping[str, tuple[Operation, ...]]
    unseen: Mapping[str, str]
    unreached: tuple[str, ...]
    plain: frozenset[str]


_DIFFERENT = (
    "forward passes of different batches call different layers, or in another order: which samples "
    "a layer has seen cannot be told"
)
_Arrived = dict[int, tuple[Operation, Tensor, list[Tensor]]]  # by the call's place


def _uses(arrived: _Arrived) -> list[Use]:
    """Uses whose gradients are complete, or that no further gradient reaches."""
    return [
        Use(operation, inputs, torch.stack(gradients))
        for operation, inputs, gradients in arrived.values()
    ]


class UseRecorder(TorchFunctionMode):
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
            return func(*args, **kwargs)
        return self._follow(func, args, kwargs, call, uses)

    def _uses(self, call: Call) -> list[tuple[Layer, Operation]]:
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

    def _follow(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        call: Call,
        uses: list[tuple[Layer, Operation]],
    ) -> Any:
        raise NotImplementedError


class Surveyor(UseRecorder):
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
        self._calls: list[tuple[Call, list[tuple[Layer, Operation]], list[Tensor]]] = []
        self._aliases: set[Node] = set()

    def _follow(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        call: Call,
        uses: list[tuple[Layer, Operation]],
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
        return output

    def survey(self, logits: Tensor) -> Survey:
        """Reads the graph of the forward pass that was watched.

        Args:
            logits: its result, samples first.

        Returns:
            What it showed.
        """
        unseen, unreached = self._used_otherwise(logits)
        if unreached:
            return Survey((), (), {}, unseen, tuple(unreached), frozenset())
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
        layouts: list[Layout | None] = []
        operations: dict[str, list[Operation]] = {}
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
            for (_, uses, _), layout in zip(self._calls, layouts, strict=True)
            for layer, _ in uses
            if layout == Layout(0) and len(seen.get(layer.name, ())) == 1
        }
        calls = tuple(tuple(layer.name for layer, _ in uses) for _, uses, _ in self._calls)
        return Survey(calls, tuple(layouts), seen, unseen, tuple(unreached), frozenset(plain))

    def _used_otherwise(self, logits: Tensor) -> tuple[dict[str, str], list[str]]:
        """Layers that the logits depend on by calls not watched, and layers they do not at all."""
        layer_of = {key: layer for key, (layer, _) in self._owner.items()}
        unseen: dict[str, str] = {}
        reached: set[int] = set()
        for node, leaf in _edges_to_leaves(logits):
            if id(leaf) in layer_of:
                reached.add(id(leaf))
                if node not in self._aliases:
                    unseen[layer_of[id(leaf)].name] = "it is used by an operation that is not known"
        unreached = [layer.name for leaf, layer in layer_of.items() if leaf not in reached]
        return unseen, list(dict.fromkeys(unreached))


class GradientCollector(UseRecorder):
    """Delivers every layer's uses with the gradients of a backward pass, as soon as complete."""

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], survey: Survey, deliver: Deliver
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

    def _follow(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        call: Call,
        uses: list[tuple[Layer, Operation]],
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
        layout: Layout,
        inputs: Tensor,
        uses: list[tuple[Layer, Operation]],
        gradient: Tensor,
    ) -> None:
        if not layout.fits(inputs, self._samples):
            names = ", ".join(layer.name for layer, _ in uses)
            raise ValueError(
                f"the input of {names} has shape {tuple(inputs.shape)} for {self._samples} "
                "samples: its samples were found elsewhere in the first batch"
            )
        inputs = layout.samples_first(inputs, self._samples)
        gradient = layout.samples_first(gradient, self._samples)
        for layer, operation in uses:
            _, arrived = self._arrived.setdefault(layer.name, (layer, {}))
            _, _, gradients = arrived.setdefault(place, (operation, inputs, []))
            gradients.append(gradient)
            done = self._complete.get(layer.name, 0) + 1
            self._complete[layer.name] = done
            if done == self._expected[layer.name] * self._directions:
                self._deliver(layer, _uses(arrived))
                del self._arrived[layer.name]


def _edges_to_leaves(output: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """Every edge of a graph that ends in a leaf: the node it comes from, and the leaf."""
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


def _leaves(output: Tensor) -> list[Tensor]:
    """What a tensor depends on at the start of its graph."""
    return list({id(leaf): leaf for _, leaf in _edges_to_leaves(output)}.values())


def _layout(leading: Sequence[int], hits: Sequence[Tensor | None]) -> Layout | None:
    """Where the samples are in a call's input.

    Args:
        leading: sizes of the dimensions that may run over samples.
        hits: for each sample, where the gradient of its logits at the call's output is not zero.

    Returns:
        The only layout that is possible by the sizes and by every sample; None if there are none or
        several.
    """
    samples = len(hits)
    possible = [Layout(axis) for axis, size in enumerate(leading) if size == samples]
    if leading and leading[0] > samples and leading[0] % samples == 0:
        possible += [Layout(0, "outer"), Layout(0, "inner")]
    for sample, hit in enumerate(hits):
        if hit is not None and len(possible) > 0:
            possible = [layout for layout in possible if _only(layout, hit, sample, samples)]
    return possible[0] if len(possible) == 1 else None


def _only(layout: Layout, hit: Tensor, sample: int, samples: int) -> bool:
    """Whether nothing but one sample's part is hit."""
    first = layout.samples_first(hit, samples)
    frames = len(first) // samples
    mine = first[sample * frames : (sample + 1) * frames]
    return int(mine.sum()) == int(first.sum())
