"""What the tensors of a client update mean, and what contradicts itself."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any, Self, TypeVar, get_args

import torch

from lightning_fedfisher.curvature.base import TensorRole
from lightning_fedfisher.curvature.registry import KINDS, KINDS_OF
from lightning_fedfisher.layers import Activation, Layer, Source

QUANTIZED_TYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
"""What a packed tensor may have been, by the name of its type."""

_MOST_ELEMENTS, _MOST_DIMENSIONS = 2**48, 16
_MOST_SAMPLES = 2**40
_T = TypeVar("_T")


@dataclass(frozen=True)
class QuantizedTensor:
    """How a tensor was packed: its root, in whole numbers of a step (see `compression`).

    Attributes:
        step: the unit.
        dtype: of the tensor before, as torch names it.
        rank: columns of a factor's root; 0 if it is a triangle.
        tail: eigenvalue of a factor in all directions but those columns'.
    """

    step: float
    dtype: str
    rank: int = 0
    tail: float = 0.0


@dataclass(frozen=True)
class UpdateHeader:
    """What the tensors of an update mean.

    Attributes:
        num_samples: training samples the client holds; its share of the merge.
        curvature: kind of curvature extracted, as given to the extraction.
        fisher: Fisher type; empty for the identity.
        likelihood: of the labels given the logits.
        curvature_samples: samples the curvature is averaged over.
        layers: the model's layers, which cover each parameter exactly once.
        kinds: kind of each layer's block, by layer name.
        metadata: anything the client wants to add, as strings.
        aliases: further names of parameters and buffers that several modules share, with the first.
        frozen: digest of each parameter that was not trained, and is not sent.
        fed_by: whose outputs each layer reads, for those that read one other layer's.
        output_layer: name of the layer whose outputs are the logits of a softmax; empty if none is.
        quantized: the tensors that are packed, by their names in the file.

    Raises:
        TypeError, ValueError: if an attribute, down to the shapes, is not of its type.
    """

    num_samples: int
    curvature: str
    fisher: str
    likelihood: str
    curvature_samples: int
    layers: tuple[Layer, ...]
    kinds: Mapping[str, str]
    metadata: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    frozen: Mapping[str, str] = field(default_factory=dict)
    fed_by: Mapping[str, Source] = field(default_factory=dict)
    output_layer: str = ""
    quantized: Mapping[str, QuantizedTensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_samples", "curvature_samples"):
            _typed(int, getattr(self, name))
        for name in ("curvature", "fisher", "likelihood", "output_layer"):
            _typed(str, getattr(self, name))
        for table in (self.kinds, self.metadata, self.aliases, self.frozen):
            for key, value in table.items():
                _typed(str, key), _typed(str, value)
        for reader, source in self.fed_by.items():
            _typed(str, reader), _typed(str, source.layer), _typed(str, source.activation)
        for name, packed in self.quantized.items():
            _typed(str, name)
            if not (_typed(float, packed.step) > 0 and math.isfinite(packed.step)):
                raise ValueError(f"{name} is packed in steps of {packed.step}")
            if _typed(str, packed.dtype) not in QUANTIZED_TYPES:
                raise ValueError(f"{name} was packed from {packed.dtype}")
            if _typed(int, packed.rank) < 0 or not 0 <= _typed(float, packed.tail) < math.inf:
                raise ValueError(f"{name} has rank {packed.rank} and tail {packed.tail}")
        for layer in self.layers:
            _typed(str, layer.name)
            for name, shape in layer.parameters:
                _typed(str, name)
                if not all(_typed(int, size) > 0 for size in shape) or not is_possible(shape):
                    raise ValueError(
                        f"layer {layer.name}: parameters/{name} has an impossible shape"
                    )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Rebuilds a header from untrusted JSON.

        Args:
            fields: as `dataclasses.asdict` writes them.

        Returns:
            The header.

        Raises:
            TypeError, ValueError, KeyError: if a field is missing, unknown or of the wrong type.
        """
        missing = {field.name for field in dataclasses.fields(cls)} - fields.keys()
        if missing:
            raise KeyError(*sorted(missing))
        layers = tuple(
            Layer(layer["name"], tuple((name, tuple(shape)) for name, shape in layer["parameters"]))
            for layer in fields["layers"]
        )
        fed_by = {reader: Source(**source) for reader, source in fields["fed_by"].items()}
        quantized = {name: QuantizedTensor(**how) for name, how in fields["quantized"].items()}
        return cls(**{**fields, "layers": layers, "fed_by": fed_by, "quantized": quantized})

    def tensors(self) -> dict[str, tuple[tuple[int, ...], TensorRole]]:
        """Shape and form of each weight and of each tensor of the curvature, by names in the file.

        Weights have the form of a basis: nothing is known of them.
        """
        found: dict[str, tuple[tuple[int, ...], TensorRole]] = {}
        for layer in self.layers:
            kind = KINDS[self.kinds[layer.name]]
            shapes = kind.tensor_shapes(layer.shape)
            found |= {f"parameters/{name}": (shape, "basis") for name, shape in layer.parameters}
            found |= {
                f"curvature/{layer.name}/{p}": (shapes[p], f) for p, f in kind.tensor_roles.items()
            }
        return found


def inconsistencies(header: UpdateHeader, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Every way in which a header and the tensors it speaks of contradict each other.

    Args:
        header: of the update.
        shapes: of its tensors, by their names in the file.

    Returns:
        One line for each.
    """
    offenders = []
    if header.num_samples < 1:
        offenders.append(f"num_samples is {header.num_samples}: an empty client has no say")
    if header.curvature_samples < 0:
        offenders.append(f"curvature_samples is {header.curvature_samples}")
    for name in ("num_samples", "curvature_samples"):
        if getattr(header, name) > _MOST_SAMPLES:
            offenders.append(f"{name} is more than {_MOST_SAMPLES}: nobody holds so many")
    expected: dict[str, tuple[int, ...]] = {}
    names = [layer.name for layer in header.layers]
    offenders += [f"two layers are named {name}" for name, n in Counter(names).items() if n > 1]
    for layer in header.layers:
        kind = KINDS.get(header.kinds.get(layer.name, "missing"))
        if kind is None:
            offenders.append(
                f"layer {layer.name}: unknown curvature {header.kinds.get(layer.name)}"
            )
            continue
        if kind.kind not in KINDS_OF.get(header.curvature, ()):
            offenders.append(f"layer {layer.name}: {kind.kind} is not {header.curvature} curvature")
        if not _forms_a_matrix(layer):
            offenders.append(f"layer {layer.name}: its parameters form no matrix")
            continue
        for name, shape in layer.parameters:
            if f"parameters/{name}" in expected:
                offenders.append(f"parameter {name} belongs to two layers")
            expected[f"parameters/{name}"] = shape
        for part, shape in kind.tensor_shapes(layer.shape).items():
            expected[f"curvature/{layer.name}/{part}"] = shape
    for name, first in header.aliases.items():
        known = f"parameters/{first}" in expected or f"buffers/{first}" in shapes
        taken = f"parameters/{name}" in expected or f"buffers/{name}" in shapes
        if not known or taken or name in header.frozen:
            offenders.append(f"{name} cannot be another name of {first}")
    offenders += [
        f"{name} is frozen and trained"
        for name in header.frozen
        if f"parameters/{name}" in expected
    ]
    offenders += [
        f"{name} is a buffer, and a parameter too"
        for name in (n.removeprefix("buffers/") for n in shapes if n.startswith("buffers/"))
        if f"parameters/{name}" in expected or name in header.frozen
    ]
    offenders += _misled(header)
    offenders += [f"{n} is packed and unknown" for n in header.quantized if n not in expected]
    found = {name: shape for name, shape in shapes.items() if not name.startswith("buffers/")}
    for name in sorted(expected.keys() | found.keys()):
        if name in header.quantized and len(found.get(name, ())) == 1:
            continue  # bytes, whose number is found wrong when they are unpacked
        if expected.get(name) != found.get(name):
            offenders.append(
                f"{name} should be {expected.get(name, 'absent')}, is {found.get(name, 'absent')}"
            )
    return offenders


def _misled(header: UpdateHeader) -> list[str]:
    """What is wrong with the wiring: `fed_by` and `output_layer`."""
    layers = {layer.name: layer for layer in header.layers if _forms_a_matrix(layer)}
    offenders = []
    if header.output_layer and header.output_layer not in layers:
        offenders.append(f"the output layer {header.output_layer} is no layer")
    for name, source in header.fed_by.items():
        if name not in layers or source.layer not in layers:
            offenders.append(f"layer {name} cannot read {source.layer}: one of them is no layer")
        elif source.activation not in get_args(Activation):
            offenders.append(f"layer {name}: unknown activation {source.activation}")
        elif layers[name].inputs % layers[source.layer].shape[0]:
            offenders.append(f"layer {name} cannot read {source.layer}: its inputs do not divide")
    try:
        TopologicalSorter({n: [source.layer] for n, source in header.fed_by.items()}).prepare()
    except CycleError as error:
        offenders.append(f"layer {error.args[1][0]} reads its own outputs")
    return offenders


def is_possible(shape: Sequence[int]) -> bool:
    """Whether a tensor of such a shape can exist.

    Args:
        shape: any, from a stranger.

    Returns:
        False if it has too many dimensions or elements, even if some size is zero.
    """
    return (
        len(shape) <= _MOST_DIMENSIONS
        and math.prod(max(size, 1) for size in shape) <= _MOST_ELEMENTS
    )


def _forms_a_matrix(layer: Layer) -> bool:
    if not layer.parameters:
        return False
    rows = math.prod(layer.parameters[0][1][:1])
    return all(math.prod(shape) % rows == 0 for _, shape in layer.parameters)


def _typed(kind: type[_T], value: Any) -> _T:
    # Exactly this type: JSON's true and 1.0 are no sample counts.
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {value!r}")
    return value
