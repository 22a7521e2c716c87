"""The file of a client update: safetensors, read tensor by tensor, trusted in nothing.

Tensors are named ``parameters/<name>``, ``buffers/<name>``, ``curvature/<layer>/<field>`` and
``input_means/<layer>``; those that are quantized lie there as bytes. One metadata entry holds the
header as JSON, with a SHA-256 digest of itself and of each tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_fedfisher._utils.files import atomic_write
from lightning_fedfisher.errors import UpdateError
from lightning_fedfisher.update.header import UpdateHeader
from lightning_fedfisher.update.safetensors_layout import (
    DTYPES,
    Spec,
    layout_size,
    read_bytes,
    read_layout,
)

SCHEMA = 2
"""Version of the format: a reader takes its own and no other."""

_METADATA_KEY = "lightning_fedfisher"
_FLOATS: tuple[torch.dtype, ...] = (  # weights and curvature
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
)
_BUFFERS = tuple(DTYPES.values())
_QUANTIZED: tuple[torch.dtype, ...] = (torch.uint8,)
_NO_DIGEST = "0" * hashlib.sha256().digest_size * 2  # as long as one
_TICK_NS = 2 * 10**9  # no file system's clock is coarser than FAT's, of two seconds


def write_file(path: Path, header: UpdateHeader, tensors: Mapping[str, Tensor]) -> None:
    """Writes an update so that a reader sees the old file or the whole new one.

    Args:
        path: Path of the file; missing folders are made.
        header: What the tensors mean.
        tensors: Tensors by their names in the file.
    """
    with tensors.opened() if isinstance(tensors, UpdateFile) else nullcontext():
        loaded = dict(tensors)
    with atomic_write(path) as partial:
        save_file(loaded, partial, _metadata(header, tensor_digests(tensors)))


def file_size(header: UpdateHeader, specs: Mapping[str, Spec]) -> int:
    """Computes the size of the file that `write_file` would write.

    Args:
        header: What the tensors mean.
        specs: Shape and type of each tensor as it lies in the file, by name.

    Returns:
        The number of bytes. No tensor is needed for it.
    """
    return layout_size(specs, _metadata(header, dict.fromkeys(specs, _NO_DIGEST)))


def file_digest(header: UpdateHeader, tensors: Mapping[str, Tensor]) -> str:
    """Computes the digest of the file that `write_file` would write.

    Args:
        header: What the tensors mean.
        tensors: Tensors by their names in the file.

    Returns:
        A SHA-256 in hexadecimal, as `UpdateFile.digest`.
    """
    if isinstance(tensors, UpdateFile):
        return tensors.digest
    found: str = json.loads(_metadata(header, tensor_digests(tensors))[_METADATA_KEY])["digest"]
    return found


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Computes the digest of each tensor; those of a file are known without reading it.

    Args:
        tensors: Tensors by their names in the file.

    Returns:
        SHA-256 in hexadecimal by name, as of `digest`.
    """
    if isinstance(tensors, UpdateFile):
        return tensors.digests
    return {name: digest(tensor) for name, tensor in tensors.items()}


def digest(tensor: Tensor) -> str:
    """Computes the SHA-256 of a tensor's type, shape and bytes.

    Args:
        tensor: Any tensor on the CPU.

    Returns:
        The digest in hexadecimal.
    """
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


class UpdateFile(Mapping[str, Tensor]):
    """The tensors of a file, each read when asked for and checked against its digest.

    The file is open only while something reads it. A tensor is hashed when it is first read, and
    again only if the file has changed since.

    Attributes:
        header: What the tensors mean.
        specs: Shape and type of each tensor as it lies in the file, by name.
        digests: SHA-256 of each tensor, by name.
        digest: SHA-256 of the header, which holds those digests: of all there is in the file.
        size: Size of the file in bytes.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file and checks its header; reads no tensor.

        Args:
            path: Path of the file.

        Raises:
            FileNotFoundError: If there is no such file.
            UpdateError: If it is truncated, no update or of another schema.
        """
        if not path.is_file():
            raise FileNotFoundError(f"there is no update file {path}")
        self._path = path
        self._handles: dict[int, FileIO] = {}  # by thread: none closes what another one reads
        self._hashed: dict[str, _FileState] = {}
        try:
            with path.open("rb", buffering=0) as file:
                self.size = os.fstat(file.fileno()).st_size
                metadata, self._slots = read_layout(file)
        except (OSError, ValueError, RecursionError) as error:
            raise UpdateError(str(path), [f"it is truncated or damaged: {error}"]) from error
        self.specs: dict[str, Spec] = {n: (s.shape, s.dtype) for n, s in self._slots.items()}
        try:
            envelope = json.loads(metadata[_METADATA_KEY])
            text = str(envelope["header"])
            self.digest = _sha256(text)
            if self.digest != envelope["digest"]:
                raise ValueError("it does not match its digest")
            fields = json.loads(text)
            schema = fields.pop("schema")
            self.digests: dict[str, str] = dict(fields.pop("digests"))
            if type(schema) is not int or schema != SCHEMA:
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
        offenders = [
            f"{name} is missing, or has no digest"
            for name in sorted(self.digests.keys() ^ self.specs.keys())
        ]
        for name, (_, dtype) in self.specs.items():
            allowed = _BUFFERS if name.startswith("buffers/") else _FLOATS
            if name in self.header.quantized:
                allowed = _QUANTIZED
            if dtype not in allowed:
                offenders.append(
                    f"{name} is of type {dtype}, not of {', '.join(map(str, allowed))}"
                )
        if offenders:
            raise UpdateError(str(path), offenders)

    def __getitem__(self, name: str) -> Tensor:
        slot = self._slots[name]
        try:
            with self.opened() as file:
                before = _FileState.of(file)
                data = read_bytes(file, slot.start, slot.size)
                state = _FileState.of(file)
        except UpdateError as error:
            reasons = "; ".join(error.offenders)
            raise UpdateError(str(self._path), [f"{name} cannot be read: {reasons}"]) from error
        except (OSError, RuntimeError, ValueError) as error:
            raise UpdateError(str(self._path), [f"{name} cannot be read: {error}"]) from error
        tensor = data.view(slot.dtype).reshape(slot.shape)
        if before == state == self._hashed.get(name):
            return tensor
        if digest(tensor) != self.digests[name]:
            raise UpdateError(
                str(self._path), [f"{name} does not match its digest: the file is damaged"]
            )
        if before == state and state.is_settled():
            self._hashed[name] = state
        return tensor

    @contextmanager
    def opened(self) -> Iterator[FileIO]:
        """Keeps the file open, so that all reads inside share one opening. It may be nested.

        Yields:
            The open file.

        Raises:
            UpdateError: If the file cannot be opened any more.
        """
        thread = threading.get_ident()
        if thread in self._handles:
            yield self._handles[thread]
            return
        try:
            file = self._path.open("rb", buffering=0)
        except OSError as error:
            raise UpdateError(str(self._path), [f"it cannot be read any more: {error}"]) from error
        with file:
            self._handles[thread] = file
            try:
                yield file
            finally:
                del self._handles[thread]

    def __getstate__(self) -> dict[str, object]:
        # Another process opens the file for itself, and takes nobody's word for its content.
        return self.__dict__ | {"_handles": {}, "_hashed": {}}

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)


class _FileState(NamedTuple):
    """What changes when a file is written to or replaced."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, file: FileIO) -> _FileState:
        """Asks for the state of an open file."""
        status = os.fstat(file.fileno())
        times = status.st_mtime_ns, status.st_ctime_ns
        return cls(status.st_dev, status.st_ino, status.st_size, *times)

    def is_settled(self) -> bool:
        """Whether another write would show: the last was longer ago than a file's clock ticks."""
        return time.time_ns() - self.modified_ns > _TICK_NS


def _metadata(header: UpdateHeader, digests: Mapping[str, str]) -> dict[str, str]:
    """Writes the one entry that the file has besides tensors."""
    fields = {**asdict(header), "schema": SCHEMA, "digests": dict(digests)}
    # One entry of sorted JSON: with several, the order of the bytes changes from run to run.
    text = json.dumps(fields, sort_keys=True)
    return {_METADATA_KEY: json.dumps({"digest": _sha256(text), "header": text}, sort_keys=True)}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
