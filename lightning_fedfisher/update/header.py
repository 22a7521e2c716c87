"""The header of a client update: what its tensors mean.

Here each field is checked for its type alone. `consistency` finds what contradicts itself.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import torch

from lightning_fedfisher._utils.text import shortened
from lightning_fedfisher.batch_norms import Normalized
from lightning_fedfisher.curvature.registry import KINDS
from lightning_fedfisher.layers import Layer, Source
from lightning_fedfisher.update.safetensors_layout import MAX_NAME, MAX_TENSORS
from lightning_fedfisher.update.tensor_checks import LARGEST_VALUE, StoredRole, is_possible

QUANTIZED_TYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
"""Types that a quantized tensor may have had, by name."""

_LONGEST_NAME = MAX_NAME - 64  # a tensor's has that of its group and its part as well
_MOST_PARAMETERS = 2  # of a layer: a weight and its bias
_T = TypeVar("_T")


@dataclass(frozen=True)
class QuantizedTensor:
    """How a tensor was quantized: its root was rounded to whole multiples of a step.

    Attributes:
        step: The step.
        dtype: Type of the tensor before, as torch names it.
        rank: Rows of a factor's root; 0 of anything else.
        tail: Eigenvalue of a factor in all directions that the root leaves out.

    Example:
        >>> QuantizedTensor(step=0.01, dtype="float32").rank
        0
    """

    step: float
    dtype: str
    rank: int = 0
    tail: float = 0.0


@dataclass(frozen=True)
class LeastSquaresFit:
    """What is known of weights that are a least-squares fit of a client's labels.

    Attributes:
        squared_error: Squared error that they leave, as a mean over samples.
        observations: Number of labels that were seen, as a mean over samples: each may hold several
            positions.

    Example:
        >>> LeastSquaresFit(squared_error=0.25, observations=1.0).observations
        1.0
    """

    squared_error: float
    observations: float


@dataclass(frozen=True)
class UpdateHeader:
    """What a client says of the tensors that it sends.

    Attributes:
        num_samples: Number of training samples that the client holds; its weight in the merge grows
            with it.
        curvature: Kind of curvature that was extracted, as it was asked for: ``"kfac"``.
        fisher: Type of Fisher information: ``"exact"``. Empty for the identity, which has none.
        likelihood: Name of the likelihood of the labels given the model's outputs.
        curvature_samples: Number of samples that the curvature is averaged over.
        layers: Layers of the model. They cover every trained parameter exactly once.
        kinds: Kind of each layer's curvature, by layer name: ``"kronecker"``.
        metadata: Anything that the client wants to add, as strings.
        aliases: Further names of parameters and buffers that several modules share, each with the
            first name.
        frozen: Digest of each parameter that was not trained and is not sent, by name.
        fed_by: The layer whose outputs a layer reads, by layer name. Only layers that read the
            outputs of one other layer are named.
        output_layer: Name of the layer whose outputs are the logits of a softmax. Empty if there is
            none.
        quantized: How tensors were quantized, by their names in the file.
        fit: What is known of the weights if they are a least-squares fit of the labels; None if
            they are not.
        normalized: The layer whose outputs a BatchNorm normalises, by the path of the BatchNorm,
            where the means of that layer's inputs are sent along.

    Raises:
        TypeError: If an attribute, or something in it, is not of its type.
        ValueError: If a shape or a quantization is impossible, a name too long, or a
            table longer than a file has tensors.

    Example:
        >>> from lightning_fedfisher.layers import find_layers
        >>> layers = find_layers(torch.nn.Linear(3, 2))
        >>> kinds = {layer.name: "diagonal" for layer in layers}
        >>> header = UpdateHeader(7, "diagonal", "exact", "categorical", 7, layers, kinds)
        >>> UpdateHeader.from_json(dataclasses.asdict(header)) == header
        True
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
    fit: LeastSquaresFit | None = None
    normalized: Mapping[str, Normalized] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_samples", "curvature_samples"):
            _typed(int, getattr(self, name))
        for name in ("curvature", "fisher", "likelihood", "output_layer"):
            _name(getattr(self, name))
        tables = (self.kinds, self.aliases, self.frozen, self.fed_by, self.normalized)
        for entries in (self.layers, self.metadata, self.quantized, *tables):
            if len(entries) > MAX_TENSORS:
                raise ValueError(f"a table of {len(entries)} entries, more than {MAX_TENSORS}")
        for table in (self.kinds, self.aliases, self.frozen):
            for key, value in table.items():
                _name(key), _name(value)
        for key, text in self.metadata.items():
            _name(key), _typed(str, text)
        if self.fit is not None:
            error = _typed(float, self.fit.squared_error)
            observations = _typed(float, self.fit.observations)
            if not 0 <= error <= LARGEST_VALUE or not 0 < observations <= LARGEST_VALUE:
                raise ValueError(f"a fit of {observations} observations leaves {error}")
        for reader, source in self.fed_by.items():
            _name(reader), _name(source.layer), _name(source.activation)
        for path, norm in self.normalized.items():
            _name(path), _name(norm.layer), _typed(int, norm.groups)
        for name, quantized in self.quantized.items():
            _typed(str, name)
            if not (_typed(float, quantized.step) > 0 and math.isfinite(quantized.step)):
                raise ValueError(f"{name} is packed in steps of {quantized.step}")
            if _typed(str, quantized.dtype) not in QUANTIZED_TYPES:
                raise ValueError(f"{name} was packed from {shortened(quantized.dtype)}")
            rank, tail = _typed(int, quantized.rank), _typed(float, quantized.tail)
            if rank < 0 or not 0 <= tail < math.inf:
                raise ValueError(f"{name} has rank {shortened(str(rank))} and tail {tail}")
        for layer in self.layers:
            _name(layer.name)
            if len(layer.parameters) > _MOST_PARAMETERS:
                raise ValueError(f"layer {layer.name}: {len(layer.parameters)} parameters in one")
            for name, shape in layer.parameters:
                _name(name)
                if not all(_typed(int, size) > 0 for size in shape) or not is_possible(shape):
                    raise ValueError(
                        f"layer {layer.name}: parameters/{name} has an impossible shape"
                    )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Rebuilds a header from untrusted JSON.

        Args:
            fields: The header as `dataclasses.asdict` writes it.

        Returns:
            The header, whose fields have their types.

        Raises:
            KeyError: If a field is missing.
            TypeError: If a field is unknown or of the wrong type.
            ValueError: If a shape, a quantization, a name or a table is impossible.
        """
        known = dataclasses.fields(cls)
        later = {"fit", "normalized"}  # which older files know nothing of
        missing = {field.name for field in known} - later - fields.keys()
        if missing:
            raise KeyError(*sorted(missing))
        layers = tuple(
            Layer(layer["name"], tuple((name, tuple(shape)) for name, shape in layer["parameters"]))
            for layer in fields["layers"]
        )
        fed_by = {reader: Source(**source) for reader, source in fields["fed_by"].items()}
        quantized = {name: QuantizedTensor(**how) for name, how in fields["quantized"].items()}
        fit = None if fields.get("fit") is None else LeastSquaresFit(**fields["fit"])
        norms = {path: Normalized(**n) for path, n in fields.get("normalized", {}).items()}
        parsed = {"layers": layers, "fed_by": fed_by, "quantized": quantized, "fit": fit}
        return cls(**{**fields, **parsed, "normalized": norms})

    def tensor_roles(self) -> dict[str, tuple[tuple[int, ...], StoredRole]]:
        """Lists what the header promises: weights, and the tensors of the curvature.

        Returns:
            Shape and role of each tensor before it was quantized, by its name in the file.
        """
        found: dict[str, tuple[tuple[int, ...], StoredRole]] = {}
        for layer in self.layers:
            kind = KINDS[self.kinds[layer.name]]
            shapes = kind.tensor_shapes(layer.shape, layer.kernel)
            found |= {f"parameters/{name}": (shape, "weights") for name, shape in layer.parameters}
            for part, role in kind.tensor_roles.items():
                found[f"curvature/{layer.name}/{part}"] = shapes[part], role
        columns = {layer.name: layer.shape[1] for layer in self.layers}
        for norm in self.normalized.values():
            found[f"input_means/{norm.layer}"] = (norm.groups, columns[norm.layer]), "mean"
        return found


def _typed(kind: type[_T], value: Any) -> _T:
    """Refuses what is not exactly of a type: JSON's true and 1.0 are no sample counts."""
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {reprlib.repr(value)}")
    return value


def _name(value: Any) -> str:
    """Refuses what is no text, or too long to be shown."""
    if len(_typed(str, value)) > _LONGEST_NAME:
        raise ValueError(f"a name of {len(value)} characters, more than {_LONGEST_NAME}")
    return value  # type: ignore[no-any-return]
