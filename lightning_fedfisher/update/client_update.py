"""ClientUpdate: the one thing that crosses from client to server.

Whatever is read of it is checked: a truncated file, a flipped bit or a NaN is an `UpdateError` that
names file and tensor.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.curvature.registry import KINDS
from lightning_fedfisher.errors import BudgetError, UpdateError
from lightning_fedfisher.layers import Layer, aliases, frozen_parameters
from lightning_fedfisher.update.compression import Compression, check, restore
from lightning_fedfisher.update.file_format import (
    UpdateFile,
    digest,
    file_digest,
    file_size,
    write_file,
)
from lightning_fedfisher.update.header import (
    QUANTIZED_TYPES,
    QuantizedTensor,
    UpdateHeader,
    inconsistencies,
)
from lightning_fedfisher.update.tensor_checks import flaw, form_of_buffer

_GRANTED = 2**14  # bytes; below it, what tells the layers is most of a file
_LONG = 1.2345678901234567e-10  # as many digits as a number may have


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
        if isinstance(tensors, UpdateFile):
            shapes, dtypes = tensors.shapes, tensors.dtypes
        else:
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        if offenders := inconsistencies(header, shapes):
            raise UpdateError(source, offenders)
        self._sent = {n: math.prod(s) * dtypes[n].itemsize for n, s in shapes.items()}
        self._unpacked = header.tensors()
        self._shapes = shapes | {name: self._unpacked[name][0] for name in header.quantized}
        self._dtypes = dtypes | {
            n: QUANTIZED_TYPES[how.dtype] for n, how in header.quantized.items()
        }

    @classmethod
    def from_model(
        cls, model: nn.Module, header: UpdateHeader, blocks: Mapping[str, Curvature]
    ) -> Self:
        """Takes the update of a trained model.

        Args:
            model: the model the curvature belongs to; its tensors are copied to the CPU. Frozen
                parameters are not sent, only their digests.
            header: what is sent with them; its kinds are those of the blocks, and what it says of
                shared and frozen parameters is taken from the model.
            blocks: the curvature of each layer, by layer name.

        Returns:
            The update.

        Raises:
            UpdateError: if a weight, buffer or block is not finite, or too large; all are named.
        """
        frozen = {n: digest(p.detach().cpu()) for n, p in frozen_parameters(model).items()}
        persistent = model.state_dict()
        shared = {
            name: first
            for name, first in aliases(model).items()
            if first not in frozen and first in persistent
        }
        header = dataclasses.replace(header, aliases=shared, frozen=frozen)
        named: dict[str, Tensor] = {
            f"parameters/{name}": tensor
            for name, tensor in model.named_parameters()
            if name not in frozen
        }
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
        update._check(definite=False)  # takes long, and an extraction gives nothing else
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
        """All trained weights by parameter name."""
        return {name: self._read(f"parameters/{name}") for name in self._names("parameters")}

    @property
    def buffers(self) -> dict[str, Tensor]:
        """All persistent buffers by name."""
        return {name: self._read(f"buffers/{name}") for name in self._names("buffers")}

    @property
    def specs(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of all trained weights and buffers by name; none of them is read."""
        return {
            name: (self._shapes[f"{group}/{name}"], self._dtypes[f"{group}/{name}"])
            for group in ("parameters", "buffers")
            for name in self._names(group)
        }

    @property
    def architecture(self) -> dict[str, object]:
        """The model without its values: what each parameter and buffer is, by name."""
        parts: dict[str, object] = {
            name: f"{shape} {str(dtype).removeprefix('torch.')}"
            for name, (shape, dtype) in self.specs.items()
        }
        parts |= {name: frozen_at(found) for name, found in self.header.frozen.items()}
        return parts | {n: f"another name of {a}" for n, a in self.header.aliases.items()}

    @property
    def model_fingerprint(self) -> str:
        """SHA-256 of the `architecture`: alike for all clients that can be merged."""
        text = json.dumps(self.architecture, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

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
        return layer.join({n: self._read(f"parameters/{n}") for n in layer.parameter_names})

    def block(self, layer: Layer) -> Curvature:
        """One layer's curvature; only this layer is read.

        Args:
            layer: one of `layers`.

        Returns:
            The layer's block.
        """
        kind = KINDS[self.header.kinds[layer.name]]
        parts = kind.tensor_shapes(layer.shape)
        tensors = {part: self._read(f"curvature/{layer.name}/{part}") for part in parts}
        return kind.from_tensors(tensors, layer.shape)

    def verify(self) -> None:
        """Reads every tensor once, one at a time, and checks it.

        Raises:
            UpdateError: naming every tensor that is corrupt, not finite, larger than float32 can
                multiply, or no curvature: not symmetric or not positive semi-definite.
        """
        self._check(definite=True)

    def _check(self, definite: bool) -> None:
        offenders: list[str] = []
        tensors = self._tensors
        with tensors.at_once() if isinstance(tensors, UpdateFile) else nullcontext():
            for name in tensors:
                known = name in self._unpacked
                form = self._unpacked[name][1] if known else form_of_buffer(name)
                if form == "factor" and not definite:
                    form = "basis"
                try:
                    tensor = self._unpack(name, check)
                except UpdateError as error:
                    offenders.extend(error.offenders)
                    continue
                # What is packed is a root, which was checked; and what has a root is definite.
                if name not in self.header.quantized and (found := flaw(tensor, form)):
                    offenders.append(f"{name} {found}")
        if offenders:
            raise UpdateError(self.source, offenders)

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every tensor by its name in the file; only what is in memory is hashed."""
        if isinstance(self._tensors, UpdateFile):
            return self._tensors.digests
        return {name: digest(tensor) for name, tensor in self._tensors.items()}

    @property
    def digest(self) -> str:
        """SHA-256 of the header and, through their digests, of all tensors: one for each update."""
        if isinstance(self._tensors, UpdateFile):
            return self._tensors.digest
        return file_digest(self.header, self._tensors)

    @property
    def upload_bytes(self) -> int:
        """Bytes of the file, whether it was written or not."""
        if isinstance(self._tensors, UpdateFile):
            return self._tensors.size
        return file_size(self.header, self._tensors)

    def sent_bytes(self, name: str) -> int:
        """Bytes that tensors take in the file, packed where they are.

        Args:
            name: of a tensor, or of a group up to a slash: ``parameters/``, ``curvature/conv1/``.

        Returns:
            Their sum.
        """
        group = [n for n in self._sent if n == name or (name.endswith("/") and n.startswith(name))]
        return sum(self._sent[n] for n in group)

    @property
    def fedavg_bytes(self) -> int:
        """Bytes a FedAvg client would send: weights and buffers as they are, nothing else."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.specs.values())

    def compressed(self, upload_budget: float) -> Self:
        """The update rounded and packed, so that its file is as small as wanted.

        Args:
            upload_budget: most bytes of the file, in multiples of `fedavg_bytes`; but 16 KiB are
                always granted.

        Returns:
            An update whose weights and curvature differ by rounding (see `compression`); buffers
            are the same. The update itself if it is small enough.

        Raises:
            ValueError: if the budget is not greater than zero.
            BudgetError: if nothing of use fits.
            UpdateError: if a curvature is not positive semi-definite.
        """
        if not 0 < upload_budget < math.inf:
            raise ValueError(f"upload_budget must be greater than 0, got {upload_budget}")
        size = max(int(upload_budget * self.fedavg_bytes), _GRANTED)
        if file_size(self.header, self._tensors) <= size:
            return self
        plain = {name: self._read(name) for name in self._tensors}
        try:
            compression = Compression(self.header, plain, size)
        except ValueError as error:
            raise UpdateError(self.source, [str(error)]) from error
        # What the rest takes: all but the bytes of what is packed.
        guess = dict.fromkeys(compression.names, QuantizedTensor(_LONG, "bfloat16", 1000, _LONG))
        nothing = {name: torch.empty(0, dtype=torch.uint8) for name in compression.names}
        room = size - file_size(dataclasses.replace(self.header, quantized=guess), plain | nothing)
        while True:
            try:
                packed, payloads = compression.fit(room)
            except BudgetError as error:
                raise BudgetError(
                    f"{self.source} does not fit into upload_budget={upload_budget:g}, {size} "
                    f"bytes: {error}. Raise it, send a smaller kind of curvature, or pass None"
                ) from None
            header, tensors = dataclasses.replace(self.header, quantized=packed), plain | payloads
            excess = file_size(header, tensors) - size
            if excess <= 0:
                return type(self)(header, tensors, self.source)
            room -= excess

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the update; a reader sees the old file or the whole new one.

        Args:
            path: of the file; missing folders are made.

        Returns:
            The path.
        """
        path = Path(path)
        write_file(path, self.header, dict(self._tensors))
        return path

    @classmethod
    def open(cls, path: str | os.PathLike[str], max_tensor_bytes: int = 2**32) -> Self:
        """Opens an update without reading its tensors.

        Args:
            path: a file written by `save`; nothing in it is trusted or executed.
            max_tensor_bytes: most bytes of memory that a tensor of it may take.

        Returns:
            The update; tensors are read, and checked against their digests, when asked for.

        Raises:
            FileNotFoundError: if there is no such file.
            UpdateError: if it is truncated, no update, of another schema, holds a tensor that is
                too large, or contradicts itself.
        """
        file = UpdateFile(Path(path))
        update = cls(file.header, file, str(path))
        sizes = {n: math.prod(s) * update._dtypes[n].itemsize for n, s in update._shapes.items()}
        if offenders := [
            f"{name} takes {size} bytes, more than max_tensor_bytes={max_tensor_bytes}"
            for name, size in sizes.items()
            if size > max_tensor_bytes
        ]:
            raise UpdateError(str(path), offenders)
        return update

    def _read(self, name: str) -> Tensor:
        """A tensor by its name in the file."""
        return self._unpack(name, restore)

    def _unpack(self, name: str, how: Callable[..., Tensor]) -> Tensor:
        tensor, packed = self._tensors[name], self.header.quantized.get(name)
        if packed is None:
            return tensor
        try:
            return how(tensor, packed, *self._unpacked[name])
        except ValueError as error:
            raise UpdateError(self.source, [f"{name} cannot be unpacked: {error}"]) from error

    def _names(self, group: str) -> list[str]:
        prefix = f"{group}/"
        return [name.removeprefix(prefix) for name in self._tensors if name.startswith(prefix)]


def frozen_at(found: str) -> str:
    """Describes a frozen parameter by its digest."""
    return f"frozen with digest {found[:8]}"
