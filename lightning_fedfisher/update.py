"""ClientUpdate: the one thing that crosses from client to server, and its file.

A file is safetensors: no code, opened lazily, tensor by tensor. Its tensors are
``parameters/<name>``, ``buffers/<name>`` and ``curvature/<layer>/<field>``; one metadata entry
holds a JSON header with what the tensors mean and a SHA-256 digest of each. Whatever is read is
checked: a truncated file, a flipped bit or a NaN is an `UpdateError` that names file and tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_fedfisher.curvature import KINDS, Curvature
from lightning_fedfisher.layers import Layer

SCHEMA = 1
_METADATA_KEY = "lightning_fedfisher"
_T = TypeVar("_T")


class UpdateError(ValueError):
    """An update cannot be used: it is corrupt, not finite, or contradicts itself."""

    def __init__(self, source: str, offenders: Sequence[str]) -> None:
        """Lists every offender in one message.

        Args:
            source: the file, or a word for an update in memory.
            offenders: one line for each tensor or field refused, with the reason.
        """
        self.offenders = tuple(offenders)
        lines = "\n".join(f"  - {offender}" for offender in offenders)
        super().__init__(f"{source} is not a usable client update:\n{lines}")


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
    """

    num_samples: int
    curvature: str
    fisher: str
    likelihood: str
    curvature_samples: int
    layers: tuple[Layer, ...]
    kinds: Mapping[str, str]
    metadata: Mapping[str, str] = field(default_factory=dict)

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
        layers = tuple(
            Layer(
                _typed(str, layer["name"]),
                tuple(
                    (_typed(str, name), tuple(_typed(int, size) for size in shape))
                    for name, shape in layer["parameters"]
                ),
            )
            for layer in fields["layers"]
        )
        for name in ("num_samples", "curvature_samples"):
            _typed(int, fields[name])
        for name in ("curvature", "fisher", "likelihood"):
            _typed(str, fields[name])
        for name in ("kinds", "metadata"):
            for key, value in fields[name].items():
                _typed(str, key), _typed(str, value)
        return cls(**{**fields, "layers": layers})


class ClientUpdate:
    """A trained model and the curvature of its loss: one client's whole contribution.

    Attributes:
        header: what the tensors mean.
        source: the file it was opened from, or a word for an update in memory.
    """

    def __init__(
        self, header: UpdateHeader, tensors: Mapping[str, Tensor], source: str = "this update"
    ) -> None:
        """Checks that header and tensors belong together; reads no tensor.

        Args:
            header: what the tensors mean.
            tensors: by their names in the file; may read them only when asked.
            source: for messages.

        Raises:
            UpdateError: if tensors are missing, unknown or of the wrong shape, if a parameter is
                covered twice, or if sample counts make no sense.
        """
        self.header = header
        self.source = source
        self._tensors = tensors
        if offenders := _inconsistencies(header, tensors):
            raise UpdateError(source, offenders)

    @classmethod
    def from_model(
        cls, model: nn.Module, header: UpdateHeader, blocks: Mapping[str, Curvature]
    ) -> Self:
        """Takes the update of a trained model.

        Args:
            model: the model the curvature belongs to; its tensors are copied to the CPU.
            header: what is sent with them; its kinds are those of the blocks.
            blocks: the curvature of each layer, by layer name.

        Returns:
            The update.

        Raises:
            UpdateError: if a weight, buffer or block is not finite; all are named.
        """
        named: dict[str, Tensor] = {
            f"parameters/{name}": tensor for name, tensor in model.named_parameters()
        }
        persistent = model.state_dict()
        for name, tensor in model.named_buffers():
            if name in persistent:
                named[f"buffers/{name}"] = tensor
        for name, block in blocks.items():
            for part, tensor in block.tensors().items():
                named[f"curvature/{name}/{part}"] = tensor
        tensors = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in named.items()
        }
        update = cls(header, tensors)
        update.verify()
        return update

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The model's layers."""
        return self.header.layers

    @property
    def num_samples(self) -> int:
        """Training samples the client holds."""
        return self.header.num_samples

    @property
    def parameters(self) -> dict[str, Tensor]:
        """All weights by parameter name."""
        return {name: self._tensors[f"parameters/{name}"] for name in self._names("parameters")}

    @property
    def buffers(self) -> dict[str, Tensor]:
        """All persistent buffers by name."""
        return {name: self._tensors[f"buffers/{name}"] for name in self._names("buffers")}

    @property
    def blocks(self) -> dict[str, Curvature]:
        """The curvature of every layer, by layer name."""
        return {layer.name: self.block(layer) for layer in self.layers}

    def weights(self, layer: Layer) -> Tensor:
        """One layer's weight matrix; only this layer is read.

        Args:
            layer: one of `layers`.

        Returns:
            A matrix of shape ``layer.shape``, in the parameters' own dtype.
        """
        return layer.join({n: self._tensors[f"parameters/{n}"] for n in layer.parameter_names})

    def block(self, layer: Layer) -> Curvature:
        """One layer's curvature; only this layer is read.

        Args:
            layer: one of `layers`.

        Returns:
            The layer's block.
        """
        kind = KINDS[self.header.kinds[layer.name]]
        parts = kind.tensor_shapes(layer.shape)
        tensors = {part: self._tensors[f"curvature/{layer.name}/{part}"] for part in parts}
        return kind.from_tensors(tensors, layer.shape)

    def verify(self) -> None:
        """Reads every tensor once, one at a time, and checks it.

        Raises:
            UpdateError: naming every tensor that is corrupt or not finite.
        """
        offenders: list[str] = []
        for name in self._tensors:
            try:
                tensor = self._tensors[name]
            except UpdateError as error:
                offenders.extend(error.offenders)
                continue
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                bad = int((~torch.isfinite(tensor)).sum())
                offenders.append(f"{name} holds {bad} values that are not finite")
        if offenders:
            raise UpdateError(self.source, offenders)

    @property
    def fedavg_bytes(self) -> int:
        """Bytes a FedAvg client would send: weights and buffers as they are, nothing else."""
        sent = (*self.parameters.values(), *self.buffers.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in sent)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the update; a reader sees the old file or the whole new one.

        Args:
            path: of the file; missing folders are made.

        Returns:
            The path.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: self._tensors[name] for name in self._tensors}
        header = {
            **asdict(self.header),
            "schema": SCHEMA,
            "digests": {name: _digest(tensor) for name, tensor in tensors.items()},
        }
        # One entry of sorted JSON: with several, the order of the bytes changes from run to run.
        text = json.dumps(header, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        metadata = {_METADATA_KEY: json.dumps({"digest": digest, "header": text}, sort_keys=True)}
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            save_file(tensors, partial, metadata)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Opens an update without reading its tensors.

        Args:
            path: a file written by `save`; nothing in it is trusted or executed.

        Returns:
            The update; tensors are read, and checked against their digests, when asked for.

        Raises:
            FileNotFoundError: if there is no such file.
            UpdateError: if it is truncated, no update, of another schema, or contradicts itself.
        """
        file = _UpdateFile(Path(path))
        return cls(file.header, file, str(path))

    def _names(self, group: str) -> list[str]:
        prefix = f"{group}/"
        return [name.removeprefix(prefix) for name in self._tensors if name.startswith(prefix)]


class _UpdateFile(Mapping[str, Tensor]):
    """The tensors of a file, each read when asked for and checked against its digest."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"there is no update file {path}")
        self._path = path
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                self.shapes = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UpdateError(str(path), [f"it is truncated or damaged: {error}"]) from error
        try:
            envelope = json.loads(metadata[_METADATA_KEY])
            text = _typed(str, envelope["header"])
            if hashlib.sha256(text.encode()).hexdigest() != envelope["digest"]:
                raise ValueError("it does not match its digest")
            fields = json.loads(text)
            schema = fields.pop("schema")
            self._digests: dict[str, str] = dict(fields.pop("digests"))
            if schema != SCHEMA:
                raise UpdateError(
                    str(path),
                    [f"its schema is {schema!r}, this version reads {SCHEMA}: extract it anew"],
                )
            self.header = UpdateHeader.from_json(fields)
        except UpdateError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            reason = f"its header is missing or malformed ({type(error).__name__}: {error})"
            raise UpdateError(str(path), [reason]) from error

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        try:
            with safe_open(self._path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UpdateError(str(self._path), [f"{name} cannot be read: {error}"]) from error
        if self._digests.get(name) != _digest(tensor):
            raise UpdateError(
                str(self._path), [f"{name} does not match its digest: the file is damaged"]
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _inconsistencies(header: UpdateHeader, tensors: Mapping[str, Tensor]) -> list[str]:
    """Every way in which a header and the shapes of the tensors contradict each other."""
    offenders = []
    if header.num_samples < 1:
        offenders.append(f"num_samples is {header.num_samples}: an empty client has no say")
    if header.curvature_samples < 0:
        offenders.append(f"curvature_samples is {header.curvature_samples}")
    expected: dict[str, tuple[int, ...]] = {}
    for layer in header.layers:
        kind = KINDS.get(header.kinds.get(layer.name, "missing"))
        if kind is None:
            offenders.append(
                f"layer {layer.name}: unknown curvature {header.kinds.get(layer.name)}"
            )
            continue
        if not _forms_a_matrix(layer):
            offenders.append(f"layer {layer.name}: its parameters form no matrix")
            continue
        for name, shape in layer.parameters:
            if f"parameters/{name}" in expected:
                offenders.append(f"parameter {name} belongs to two layers")
            expected[f"parameters/{name}"] = shape
        for part, shape in kind.tensor_shapes(layer.shape).items():
            expected[f"curvature/{layer.name}/{part}"] = shape
    if isinstance(tensors, _UpdateFile):
        found = tensors.shapes
    else:
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    found = {name: shape for name, shape in found.items() if not name.startswith("buffers/")}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            offenders.append(
                f"{name} should be {expected.get(name, 'absent')}, is {found.get(name, 'absent')}"
            )
    return offenders


def _forms_a_matrix(layer: Layer) -> bool:
    sizes = [size for _, shape in layer.parameters for size in shape]
    if not layer.parameters or any(size < 1 for size in sizes):
        return False
    rows = math.prod(layer.parameters[0][1][:1])
    return all(math.prod(shape) % rows == 0 for _, shape in layer.parameters)


def _digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _typed(kind: type[_T], value: Any) -> _T:
    # Exactly this type: JSON's true and 1.0 are no sample counts.
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {value!r}")
    return value
