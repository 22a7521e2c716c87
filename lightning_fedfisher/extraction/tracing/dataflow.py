"""Follows whose outputs a layer reads, from call to call through a forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightning_fedfisher.layers import Activation, Source

# Functions go by name, because a module, a method and a function of `torch` call different objects.
_RECTIFIERS = {"relu", "relu_"}
_DROPOUTS = {"dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"}
# With the number of dimensions that each pools, which are the last ones.
_POOLS = {
    f"{adaptive}{kind}_pool{dimensions}d": dimensions
    for adaptive in ("", "adaptive_")
    for kind in ("max", "avg")
    for dimensions in (1, 2, 3)
}
_RESHAPES = {"flatten", "reshape", "view", "contiguous"}
# Logits and their log-softmax have the same softmax. What reads a log-softmax has no source.
_NORMALISERS = {"log_softmax"}


@dataclass(frozen=True)
class _Mark:
    """What a tensor holds.

    Attributes:
        layer: Name of the layer whose outputs it holds.
        activation: What the outputs went through. None if that is more than `Source` can say.
        axis: Dimension of the outputs. Each is a block of it if positions were flattened into it.
        version: Version of the tensor, which counts changes in place.
    """

    layer: str
    activation: Activation | None
    axis: int
    version: int


class Dataflow:
    """Marks the outputs of layers, and what elementwise functions, pools and reshapes make of them.

    What any other function returns, or changes in place, is not marked.

    Example:
        >>> import torch
        >>> from torch.nn import functional
        >>> flow, outputs = Dataflow(), torch.ones(4, 3)
        >>> flow.mark_output(outputs, "first", axis=1)
        >>> activated = flow.run(functional.relu, (outputs,), {})
        >>> flow.find_source(activated, axis=1)
        Source(layer='first', activation='relu')
    """

    def __init__(self) -> None:
        """Starts with no marks."""
        # The tensors are kept as well, because the id of a tensor that is gone may be given anew.
        self._marks: dict[int, tuple[Tensor, _Mark]] = {}

    def mark_output(self, output: Tensor, layer: str, axis: int) -> None:
        """Marks the outputs of a layer.

        Args:
            output: What the call of the layer returned.
            layer: Name of the layer.
            axis: Dimension of `output` that runs over the layer's outputs.
        """
        self._mark(output, _Mark(layer, "identity", axis, 0))

    def run(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Makes a call, and marks its result if that still holds the outputs of one layer.

        Args:
            func: Any function.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Returns:
            What the function returns.
        """
        given = args[0] if args and isinstance(args[0], Tensor) else None
        mark = None if given is None else self._find(given)  # before it is changed in place
        output = func(*args, **kwargs)
        if given is None or mark is None or not isinstance(output, Tensor):
            return output
        name = getattr(func, "__name__", "")
        if name in _RECTIFIERS:
            self._mark(output, replace(mark, activation=mark.activation and "relu"))
        elif name in _NORMALISERS and mark.activation != "relu":
            self._mark(output, replace(mark, activation=None))
        elif (
            (name in _POOLS and mark.axis < given.ndim - _POOLS[name])
            or name in _DROPOUTS
            or (name in _RESHAPES and _keeps_blocks(given, output, mark.axis))
        ):
            self._mark(output, mark)
        return output

    def find_source(self, inputs: Tensor, axis: int) -> Source | None:
        """Finds the layer whose outputs the input of a call holds.

        Args:
            inputs: Input of the call.
            axis: Dimension of `inputs` that the call reads.

        Returns:
            The layer, with what its outputs went through. None if the input holds anything else.
        """
        mark = self._find(inputs)
        if mark is None or mark.activation is None or mark.axis != axis:
            return None
        return Source(mark.layer, mark.activation)

    def find_output_layer(self, logits: Tensor) -> str:
        """Finds the layer whose outputs the logits, or their log-softmax, hold.

        Args:
            logits: Logits with classes in the second dimension.

        Returns:
            Name of the layer. Empty if the logits hold anything else.
        """
        mark = self._find(logits)
        return mark.layer if mark and mark.axis == 1 and mark.activation != "relu" else ""

    def _mark(self, tensor: Tensor, mark: _Mark) -> None:
        self._marks[id(tensor)] = tensor, replace(mark, version=tensor._version)

    def _find(self, tensor: Tensor) -> _Mark | None:
        _, mark = self._marks.get(id(tensor), (None, None))
        return mark if mark is not None and mark.version == tensor._version else None


def _keeps_blocks(before: Tensor, after: Tensor, axis: int) -> bool:
    """Tells whether a reshape changed nothing, or flattened all positions into the channels."""
    if after.shape == before.shape:
        return True
    flat = (len(before), math.prod(before.shape[1:]))
    return axis == 1 and tuple(after.shape) == flat
