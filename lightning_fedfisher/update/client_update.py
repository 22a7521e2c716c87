"""ClientUpdate: the one thing that crosses from client to server.

Whatever is read of it is checked: a truncated file, a flipped bit or a NaN is an `UpdateError` that
names file and tensor.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_fedfisher.batch_norms import RunningStatistics
from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.curvature.registry import KINDS
from lightning_fedfisher.errors import BudgetError, UpdateError
from lightning_fedfisher.layers import Layer
from lightning_fedfisher.update.architecture import describe_architecture, fingerprint
from lightning_fedfisher.update.compression import compress
from lightning_fedfisher.update.consistency import inconsistencies
from lightning_fedfisher.update.decompression import restore
from lightning_fedfisher.update.file_format import (
    UpdateFile,
    file_digest,
    file_size,
    tensor_digests,
    write_file,
)
from lightning_fedfisher.update.header import QUANTIZED_TYPES, UpdateHeader
from lightning_fedfisher.update.model_tensors import collect_tensors
from lightning_fedfisher.update.safetensors_layout import Spec, spec_bytes
from lightning_fedfisher.update.unpacked_size import excesses, unpacked_excess
from lightning_fedfisher.update.upload_budget import budget_bytes, budget_error, shortage
from lightning_fedfisher.update.verification import damages


class ClientUpdate:
    """A trained model and the curvature of its loss: everything that one client sends.

    Attributes:
        header: What the tensors mean.
        source: The file it was opened from, or a phrase for an update in memory.

    Example:
        >>> import torch
        >>> from lightning_fedfisher.curvature.diagonal import Diagonal
        >>> from lightning_fedfisher.layers import find_layers
        >>> model = torch.nn.Linear(3, 2)
        >>> (layer,) = find_layers(model)
        >>> blocks = {layer.name: Diagonal(torch.ones(layer.shape))}
        >>> kinds = {layer.name: "diagonal"}
        >>> header = UpdateHeader(7, "diagonal", "exact", "categorical", 7, (layer,), kinds)
        >>> update = ClientUpdate.from_model(model, header, blocks)
        >>> update.weights(layer).shape, update.block(layer).kind
        (torch.Size([2, 4]), 'diagonal')
    """

    def __init__(
        self, header: UpdateHeader, tensors: Mapping[str, Tensor], source: str = "this update"
    ) -> None:
        """Checks that header and tensors belong together; reads no tensor.

        Args:
            header: What the tensors mean.
            tensors: Tensors by their names in the file. An `UpdateFile` reads them when asked.
            source: What messages call the update.

        Raises:
            UpdateError: If tensors are missing, unknown or of the wrong shape, if a parameter is
                covered twice, or if sample counts make no sense.
        """
        self.header = header
        self.source = source
        self._tensors = tensors
        if isinstance(tensors, UpdateFile):
            self._stored = tensors.specs
        else:
            self._stored = {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}
        shapes = {name: shape for name, (shape, _) in self._stored.items()}
        if offenders := inconsistencies(header, shapes):
            raise UpdateError(source, offenders)
        self._roles = header.tensor_roles()
        self._specs = self._stored | {
            name: (self._roles[name][0], QUANTIZED_TYPES[how.dtype])
            for name, how in header.quantized.items()
        }

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        header: UpdateHeader,
        blocks: Mapping[str, Curvature],
        statistics: RunningStatistics | None = None,
    ) -> Self:
        """Makes the update of a trained model.

        Args:
            model: Model that the curvature belongs to; its tensors are copied to the CPU. Frozen
                parameters are not sent, only their digests.
            header: Header to send. Its kinds are those of the blocks; what it says of shared and
                frozen parameters is taken from the model.
            blocks: Curvature of each layer, by layer name.
            statistics: The extraction's `statistics`; None if none were measured.

        Returns:
            The update, in memory.

        Raises:
            UpdateError: If any tensor is not finite or too large; all are named.
        """
        update = cls(*collect_tensors(model, header, blocks, statistics))
        update.verify(definite=False)  # takes long, and an extraction gives nothing else
        return update

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Layers of the model, in the order of its parameters."""
        return self.header.layers

    @property
    def num_samples(self) -> int:
        """Number of training samples that the client holds."""
        return self.header.num_samples

    @property
    def parameters(self) -> dict[str, Tensor]:
        """All trained weights by parameter name."""
        return self._group("parameters")

    @property
    def buffers(self) -> dict[str, Tensor]:
        """All persistent buffers by name."""
        return self._group("buffers")

    @property
    def buffer_names(self) -> list[str]:
        """Names of all persistent buffers."""
        return self._names("buffers")

    def buffer(self, name: str) -> Tensor:
        """Reads one buffer by its name."""
        return self._read(f"buffers/{name}")

    def input_mean(self, layer: Layer) -> Tensor:
        """Reads the mean of what a layer's columns read, of shape ``(groups, columns)``."""
        return self._read(f"input_means/{layer.name}")

    @cached_property
    def specs(self) -> dict[str, Spec]:
        """Shape and dtype of all trained weights and buffers by name; none of them is read."""
        return {
            name: self._specs[f"{group}/{name}"]
            for group in ("parameters", "buffers")
            for name in self._names(group)
        }

    @property
    def architecture(self) -> dict[str, object]:
        """The model without its values: what each parameter and buffer is, by name."""
        return describe_architecture(self.header, self.specs)

    @property
    def model_fingerprint(self) -> str:
        """SHA-256 of the `architecture`: the same for all clients that can be merged."""
        return fingerprint(self.architecture)

    @property
    def blocks(self) -> dict[str, Curvature]:
        """The curvature of every layer, by layer name."""
        with self.opened():
            return {layer.name: self.block(layer) for layer in self.layers}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keeps the update's file open, so that all reads inside share one opening.

        It may be nested. Without it, the file is opened for each tensor. An update in memory has no
        file, and nothing happens.

        Raises:
            UpdateError: If the file cannot be opened any more.
        """
        if isinstance(self._tensors, UpdateFile):
            with self._tensors.opened():
                yield
        else:
            yield

    def weights(self, layer: Layer) -> Tensor:
        """Reads one layer's weight matrix, and no other layer.

        Args:
            layer: One of `layers`.

        Returns:
            A matrix of shape ``layer.shape`` in the parameters' dtype, a bias as its last column.

        Raises:
            UpdateError: If a tensor of the layer is damaged.
        """
        return layer.join({n: self._read(f"parameters/{n}") for n in layer.parameter_names})

    def block(
        self,
        layer: Layer,
        power: float = 1.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        damping: float = 0.0,
        inputs_power: float | None = None,
    ) -> Curvature:
        """Reads one layer's curvature, and no other layer.

        Args:
            layer: One of `layers`.
            power: Power that it is raised to (`Curvature.power`).
            device: Where to work, and ``dtype`` in which type; by default as it was sent.
            dtype: See ``device``.
            damping: See `Curvature.power`, and there ``inputs_exponent`` for ``inputs_power``.
            inputs_power: See ``damping``.

        Returns:
            The curvature of the layer's weight matrix.

        Raises:
            ValueError: If the power is not greater than zero.
            UpdateError: If a tensor of the curvature is damaged.
        """
        kind, prefix = KINDS[self.header.kinds[layer.name]], f"curvature/{layer.name}/"
        tensors = {
            part: self._read(prefix + part, exponent, device, dtype, damped)
            for part, (exponent, damped) in kind.part_powers(power, damping, inputs_power).items()
        }
        return kind.from_tensors(tensors, layer.shape, layer.kernel)

    def verify(self, decode: bool = True, curvature: bool = True, definite: bool = True) -> None:
        """Reads every tensor once, one at a time, and checks it.

        Args:
            decode: Whether to decode what is quantized; its digest is checked in any case.
            curvature: Whether to read the curvature as well.
            definite: Whether to make sure that it is symmetric and positive semi-definite.

        Raises:
            UpdateError: If a tensor is damaged, not finite, larger than float32 can multiply, or no
                curvature, or a layer's weights and curvature are too large together; all named.
        """
        with self.opened():
            found = damages(self.header, self._tensors, decode, curvature, definite)
        if found:
            raise UpdateError(self.source, found)

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every tensor by its name in the file; only what is in memory is hashed."""
        return tensor_digests(self._tensors)

    @property
    def digest(self) -> str:
        """SHA-256 of the header and, through their digests, of all tensors: one for each update."""
        return file_digest(self.header, self._tensors)

    @property
    def upload_bytes(self) -> int:
        """Size of the file in bytes, whether it was written or not."""
        file = self._tensors
        return file.size if isinstance(file, UpdateFile) else file_size(self.header, self._stored)

    def sent_bytes(self, group: str) -> int:
        """Counts the bytes that a group of tensors takes in the file, as they are sent.

        Args:
            group: ``"parameters/"``, ``"curvature/"``, ``"buffers/"`` or ``"input_means/"``.
        """
        group = group.rstrip("/")
        return sum(spec_bytes(spec) for n, spec in self._stored.items() if n.split("/")[0] == group)

    def layer_bytes(self, layer: Layer) -> tuple[int, int]:
        """Counts the bytes that one layer's weights and curvature take in the file, as they are.

        Args:
            layer: One of `layers`.
        """
        parts = KINDS[self.header.kinds[layer.name]].tensor_roles
        weights = (self._stored[f"parameters/{name}"] for name in layer.parameter_names)
        curvature = (self._stored[f"curvature/{layer.name}/{part}"] for part in parts)
        return sum(map(spec_bytes, weights)), sum(map(spec_bytes, curvature))

    @property
    def fedavg_bytes(self) -> int:
        """Bytes that a FedAvg client would send: weights and buffers as they are, nothing else."""
        return sum(map(spec_bytes, self.specs.values()))

    def compressed(self, upload_budget: float, *, consume: bool = False) -> Self:
        """Rounds weights and curvature so that the file is as small as wanted.

        Args:
            upload_budget: Largest size of the file in `fedavg_bytes`; 16 KiB are always allowed.
            consume: Whether this update is emptied, so that memory is free as it is rounded.

        Returns:
            An update whose weights and curvature differ by rounding (see `compression`); buffers
            are the same. The update itself if it is small enough.

        Raises:
            ValueError: If the budget is not greater than zero.
            BudgetError: If nothing of use fits.
            UpdateError: If a curvature is not positive semi-definite.
        """
        if self.upload_bytes <= (size := budget_bytes(upload_budget, self.fedavg_bytes)):
            return self
        with self.opened():
            plain = {name: self._read(name) for name in self._tensors}
        if consume:
            self._tensors = {}
        try:
            header, tensors = compress(self.header, plain, size)
        except BudgetError as error:
            raise budget_error(self.source, upload_budget, size, error) from None
        except ValueError as error:
            raise UpdateError(self.source, getattr(error, "offenders", [str(error)])) from error
        smaller = type(self)(header, tensors, self.source)
        if excess := unpacked_excess(header, header.quantized, smaller.upload_bytes):
            raise budget_error(self.source, upload_budget, size, excess)
        return smaller

    def require_room(self, upload_budget: float) -> None:
        """Refuses a budget that is hopeless, without compressing anything.

        Raises:
            BudgetError: If there is not even room for a bit of each entry, or so little that a
                reader would take the file for one that unpacks to any size.
        """
        rest = sum(map(self.sent_bytes, ("buffers", "input_means")))
        size = budget_bytes(upload_budget, self.fedavg_bytes)
        if self.upload_bytes > size and (why := shortage(self.header, rest, size)):
            raise budget_error(self.source, upload_budget, size, why)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the update, and returns the path; a reader sees the old file or the whole new one.

        Args:
            path: Path of the file; missing folders are made.
        """
        write_file(path := Path(path), self.header, self._tensors)
        return path

    @classmethod
    def open(cls, path: str | os.PathLike[str], max_tensor_bytes: int = 2**32) -> Self:
        """Opens an update without reading its tensors.

        The file is closed again: thousands of updates may be open. A tensor is read when it is
        asked for, and each time checked against its digest: a file that changes is refused then.

        Args:
            path: A file written by `save`; nothing in it is trusted or executed.
            max_tensor_bytes: Most bytes of memory that one of its tensors may take.

        Returns:
            The update.

        Raises:
            FileNotFoundError: If there is no such file.
            UpdateError: If it is no file, truncated, no update, of another schema, holds a tensor
                that is too large, unpacks to far more than its size, or contradicts itself.
        """
        try:
            update = cls((file := UpdateFile(Path(path))).header, file, str(path))
        except (UpdateError, FileNotFoundError):
            raise
        except Exception as error:  # whatever a stranger's header leads to
            raise UpdateError(str(path), [f"it is malformed ({error!r})"]) from error
        if offenders := excesses(file.header, update._specs, file.size, max_tensor_bytes):
            raise UpdateError(str(path), offenders)
        return update

    def _read(self, name: str, *how: Any) -> Tensor:
        """Reads a tensor by its name in the file; ``how`` is what `restore` takes beside that."""
        stored, quantized = self._tensors[name], self.header.quantized.get(name)
        shape, role = self._roles.get(name, ((), "weights"))  # a buffer is as it is stored
        try:
            return restore(stored, quantized, shape, role, *how)
        except (ValueError, MemoryError) as error:
            raise UpdateError(self.source, [f"{name} cannot be unpacked: {error}"]) from error

    def _group(self, group: str) -> dict[str, Tensor]:
        """Reads the tensors of a group."""
        with self.opened():
            return {name: self._read(f"{group}/{name}") for name in self._names(group)}

    def _names(self, group: str) -> list[str]:
        """Lists the tensors of a group, without the group's name."""
        return [n.removeprefix(f"{group}/") for n in self._stored if n.startswith(f"{group}/")]
