"""Whose outputs a layer reads, followed from call to call through a forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightning_fedfisher.layers import Activation, Source

# Functions known by name: a module, a method and a function of `torch` end in different objects.
_RECTIFIERS = {"relu", "relu_"}
_DROPOUTS = {"dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"}
# With the number of dimensions that each pools, which are the last.
_POOLS = {
    f"{adaptive}{kind}_pool{dimensions}d": dimensions
    for adaptive in ("", "adaptive_")
    for kind in ("max", "avg")
    for dimensions in (1, 2, 3)
}
_RESHAPES = {"flatten", "reshape", "view", "contiguous"}
# The same function of the logits to a softmax, and no source of anything.
_NORMALISERS = {"log_softmax"}


@dataclass(frozen=True)
class _Mark:
    """What a tensor holds.

    Attributes:
        layer: whose outputs.
        activation: what they went through; None if more than `Source` can say.
        axis: dimension of the outputs, each a block of it if positions were flattened into it.
        version: of the tensor, which counts changes in place.
    """

    layer: str
    activation: Activation | None
    axis: int
    version: int


class Dataflow:
    """Marks the outputs of layers, and what elementwise functions, pools and reshapes make of them.

    What any other function returns, or changes in place, is not marked.
    """

    def __init__(self) -> None:
        """Starts with no marks."""
        # The tensors themselves are kept, as an id is only one's own for as long as one lives.
        self._marks: dict[int, tuple[Tensor, _Mark]] = {}

    def begin(self, output: Tensor, layer: str, axis: int) -> None:
        """Marks a layer's outputs.

        Args:
            output: of the layer's call.
            layer: its name.
            axis: dimension of the outputs.
        """
        self._mark(output, _Mark(layer, "identity", axis, 0))

    def run(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Makes a call, and marks what it returns if that is still one layer's outputs.

        Args:
            func: any function.
            args: positional arguments.
            kwargs: arguments by keyword.

        Returns:
            What the function returns.
        """
        given = args[0] if args and isinstance(args[0], Tensor) else None
        mark = None if given is None else self._of(given)  # before it is changed in place
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

    def source(self, inputs: Tensor, axis: int) -> Source | None:
        """Whose outputs the inputs of a call are.

        Args:
            inputs: of the call.
            axis: dimension that the call reads.

        Returns:
            The layer, with what its outputs went through; None if the inputs are anything else.
        """
        mark = self._of(inputs)
        if mark is None or mark.activation is None or mark.axis != axis:
            return None
        return Source(mark.layer, mark.activation)

    def head(self, logits: Tensor) -> str:
        """The layer whose outputs the logits are, or their log-softmax.

        Args:
            logits: classes in the dimension after the samples'.

        Returns:
            Its name; empty if they are anything else.
        """
        mark = self._of(logits)
        return mark.layer if mark and mark.axis == 1 and mark.activation != "relu" else ""

    def _mark(self, tensor: Tensor, mark: _Mark) -> None:
        self._marks[id(tensor)] = tensor, replace(mark, version=tensor._version)

    def _of(self, tensor: Tensor) -> _Mark | None:
        _, mark = self._marks.get(id(tensor), (None, None))
        return mark if mark is not None and mark.version == tensor._version else None


def _keeps_blocks(before: Tensor, after: Tensor, axis: int) -> bool:
    """Whether a reshape changed nothing, or flattened all positions into the channels."""
    if after.shape == before.shape:
        return True
    flat = (len(before), math.prod(before.shape[1:]))
    return axis == 1 and tuple(after.shape) == flat
