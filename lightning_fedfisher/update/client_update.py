"""ClientUpdate: the one thing that crosses from client to server.

Whatever is read of it is checked: a truncated file, a flipped bit or a NaN is an `UpdateError` that
names file and tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
from lightning_fedfisher.update.buffer_roles import buffer_role
from lightning_fedfisher.update.compression import compress, fewest_bytes
from lightning_fedfisher.update.consistency import inconsistencies
from lightning_fedfisher.update.decompression import decode_root, restore
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
from lightning_fedfisher.update.tensor_checks import find_problem
from lightning_fedfisher.update.upload_budget import budget_bytes, budget_error


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
        update._check(definite=False)  # takes long, and an extraction gives nothing else
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

    def input_mean(self, layer: Layer) -> Tensor:
        """Reads the mean of what a layer's columns read, of shape ``(groups, columns)``."""
        return self._read(f"input_means/{layer.name}")

    @property
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

    def verify(self, decode: bool = True, curvature: bool = True) -> None:
        """Reads every tensor once, one at a time, and checks it.

        Args:
            decode: Whether to decode what is quantized; its digest is checked in any case.
            curvature: Whether to read the curvature as well.

        Raises:
            UpdateError: If a tensor is damaged, not finite, larger than float32 can multiply, or no
                curvature: not symmetric or not positive semi-definite. All are named.
        """
        self._check(True, decode, curvature)

    def _check(self, definite: bool, decode: bool = True, curvature: bool = True) -> None:
        """Checks every tensor; whether factors are curvature only if ``definite``."""
        offenders: list[str] = []
        with self.opened():
            for name in (n for n in self._tensors if curvature or n.split("/")[0] != "curvature"):
                role = self._roles[name][1] if name in self._roles else buffer_role(name)
                if role == "factor" and not definite:
                    role = "basis"
                packed = name in self.header.quantized
                unpacks = packed and decode
                try:
                    read = self._read(name, decode=decode_root) if unpacks else self._tensors[name]
                except UpdateError as error:
                    offenders += error.offenders
                    continue
                # What is quantized is a root, which was checked; and what has a root is definite.
                if not packed and (found := find_problem(read, role)):
                    offenders.append(f"{name} {found}")
        if offenders:
            raise UpdateError(self.source, offenders)

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
        held = self._tensors
        return held.size if isinstance(held, UpdateFile) else file_size(self.header, self._stored)

    def sent_bytes(self, name: str) -> int:
        """Counts the bytes that tensors take in the file, as they are sent.

        Args:
            name: Name of a tensor in the file, or of a group of them up to a slash:
                ``parameters/``, ``curvature/conv1/``; 0 if there are none.
        """
        return sum(
            spec_bytes(spec)
            for n, spec in self._stored.items()
            if n == name or (name.endswith("/") and n.startswith(name))
        )

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
        return type(self)(header, tensors, self.source)

    def require_room(self, upload_budget: float) -> None:
        """Refuses a budget that is hopeless, without compressing anything.

        Raises:
            BudgetError: If there is not even room for a bit of each entry.
        """
        rest = sum(map(self.sent_bytes, ("buffers/", "input_means/")))
        least = rest + fewest_bytes(self.header)
        size = budget_bytes(upload_budget, self.fedavg_bytes)
        if size < min(self.upload_bytes, least):
            why = f"at least {least} bytes are needed"
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
        asked for. It is checked against its digest when it is first read, and again if the file has
        changed since.

        Args:
            path: A file written by `save`; nothing in it is trusted or executed.
            max_tensor_bytes: Most bytes of memory that one of its tensors may take.

        Returns:
            The update.

        Raises:
            FileNotFoundError: If there is no such file.
            UpdateError: If it is truncated, no update, of another schema, holds a tensor that is
                too large, or contradicts itself.
        """
        file = UpdateFile(Path(path))
        update = cls(file.header, file, str(path))
        if offenders := [
            f"{name} takes {spec_bytes(spec)} bytes, more than max_tensor_bytes={max_tensor_bytes}"
            for name, spec in update._specs.items()
            if spec_bytes(spec) > max_tensor_bytes
        ]:
            raise UpdateError(str(path), offenders)
        return update

    def _read(self, name: str, *how: Any, decode: Callable[..., Tensor] = restore) -> Tensor:
        """Reads a tensor by its name in the file; ``how`` is what `restore` takes beside that."""
        stored, quantized = self._tensors[name], self.header.quantized.get(name)
        shape, role = self._roles.get(name, ((), "weights"))  # a buffer is as it is stored
        try:
            return decode(stored, quantized, shape, role, *how)
        except ValueError as error:
            raise UpdateError(self.source, [f"{name} cannot be unpacked: {error}"]) from error

    def _group(self, group: str) -> dict[str, Tensor]:
        """Reads the tensors of a group."""
        with self.opened():
            return {name: self._read(f"{group}/{name}") for name in self._names(group)}

    def _names(self, group: str) -> list[str]:
        """Lists the tensors of a group, without the group's name."""
        return [n.removeprefix(f"{group}/") for n in self._stored if n.startswith(f"{group}/")]
