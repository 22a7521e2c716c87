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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from io import FileIO
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_fedfisher._utils.files import atomic_write
from lightning_fedfisher._utils.text import shortened
from lightning_fedfisher.errors import UpdateError
from lightning_fedfisher.update.header import UpdateHeader
from lightning_fedfisher.update.safetensors_layout import (
    DTYPES,
    Spec,
    layout_size,
    open_regular,
    parse_json,
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

    The file is open only while something reads it. A tensor is copied into memory of its own and
    hashed there, each time anew: whatever happens to the file, what is used is what was checked.

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
        self._path = path
        self._handles: dict[int, FileIO] = {}  # by thread: none closes what another one reads
        try:
            with open_regular(path) as file:
                self.size = os.fstat(file.fileno()).st_size
                metadata, self._slots = read_layout(file)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no update file {path}") from error
        except OSError as error:
            raise UpdateError(str(path), [f"it cannot be read: {error}"]) from error
        except (ValueError, RecursionError) as error:
            raise UpdateError(str(path), [f"it is truncated or damaged: {error}"]) from error
        self.specs: dict[str, Spec] = {n: (s.shape, s.dtype) for n, s in self._slots.items()}
        try:
            self.header, self.digests, self.digest = _parsed(metadata)
        except _SchemaError as error:
            raise UpdateError(str(path), [str(error)]) from None
        except Exception as error:  # of whatever type: no list of them would be known to be whole
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
                data = read_bytes(file, slot.start, slot.size)
        except UpdateError as error:
            reasons = "; ".join(error.offenders)
            raise UpdateError(str(self._path), [f"{name} cannot be read: {reasons}"]) from error
        except (OSError, MemoryError, RuntimeError, ValueError) as error:
            raise UpdateError(str(self._path), [f"{name} cannot be read: {error}"]) from error
        tensor = data.view(slot.dtype).reshape(slot.shape)
        if digest(tensor) != self.digests[name]:
            raise UpdateError(
                str(self._path), [f"{name} does not match its digest: the file is damaged"]
            )
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
            file = open_regular(self._path)
        except (OSError, ValueError) as error:
            raise UpdateError(str(self._path), [f"it cannot be read any more: {error}"]) from error
        with file:
            self._handles[thread] = file
            try:
                yield file
            finally:
                del self._handles[thread]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_handles": {}}  # another process opens the file for itself

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)


class _SchemaError(Exception):
    """The file is of another version of the format."""


def _parsed(metadata: Mapping[str, str]) -> tuple[UpdateHeader, dict[str, str], str]:
    """Reads a stranger's header, with the digests of the tensors and that of itself.

    Raises:
        _SchemaError: If it is of another version.
        Exception: Of whatever type JSON of another form leads to, if it is malformed.
    """
    envelope = parse_json(metadata[_METADATA_KEY])
    text = envelope["header"]
    if type(text) is not str or envelope["digest"] != _sha256(text):
        raise ValueError("it does not match its digest")
    fields = parse_json(text)
    schema, digests = fields.pop("schema"), fields.pop("digests")
    if type(schema) is not int or schema != SCHEMA:
        raise _SchemaError(
            f"its schema is {shortened(repr(schema))}, this version reads {SCHEMA}: extract it anew"
        )
    if type(digests) is not dict or any(type(found) is not str for found in digests.values()):
        raise TypeError("its digests are no table of texts")
    return UpdateHeader.from_json(fields), digests, _sha256(text)


def _metadata(header: UpdateHeader, digests: Mapping[str, str]) -> dict[str, str]:
    """Writes the one entry that the file has besides tensors."""
    fields = {**asdict(header), "schema": SCHEMA, "digests": dict(digests)}
    # One entry of sorted JSON: with several, the order of the bytes changes from run to run.
    text = json.dumps(fields, sort_keys=True)
    return {_METADATA_KEY: json.dumps({"digest": _sha256(text), "header": text}, sort_keys=True)}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
