"""The file of a client update: safetensors, read tensor by tensor, trusted in nothing.

Tensors are named ``parameters/<name>``, ``buffers/<name>`` and ``curvature/<layer>/<field>``; what
is packed is there as bytes. One metadata entry holds the header as JSON, with a SHA-256 digest of
itself and of each tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from lightning_fedfisher._utils.files import atomic_write
from lightning_fedfisher.errors import UpdateError
from lightning_fedfisher.update.header import UpdateHeader, is_possible

SCHEMA = 1
_MOST_HEADER, _MOST_TENSORS = 2**24, 2**14
_METADATA_KEY = "lightning_fedfisher"
_FLOATS = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_BYTES = {"U8": torch.uint8}
_BUFFER_TYPES = _FLOATS | {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


def write_file(path: Path, header: UpdateHeader, tensors: Mapping[str, Tensor]) -> None:
    """Writes an update; a reader sees the old file or the whole new one.

    Args:
        path: of the file; missing folders are made.
        header: what the tensors mean.
        tensors: by their names in the file.
    """
    with atomic_write(path) as partial:
        save_file(dict(tensors), partial, _metadata(header, tensors))


def file_size(header: UpdateHeader, tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the file that `write_file` would write.

    Args:
        header: what the tensors mean.
        tensors: by their names in the file.

    Returns:
        The size, without writing.
    """
    return len(save(dict(tensors), _metadata(header, tensors)))


def file_digest(header: UpdateHeader, tensors: Mapping[str, Tensor]) -> str:
    """Digest of the file that `write_file` would write.

    Args:
        header: what the tensors mean.
        tensors: by their names in the file.

    Returns:
        As `UpdateFile.digest`.
    """
    found: str = json.loads(_metadata(header, tensors)[_METADATA_KEY])["digest"]
    return found


def _metadata(header: UpdateHeader, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The one entry that the file has besides tensors."""
    fields = {
        **asdict(header),
        "schema": SCHEMA,
        "digests": {name: digest(tensor) for name, tensor in tensors.items()},
    }
    # One entry of sorted JSON: with several, the order of the bytes changes from run to run.
    text = json.dumps(fields, sort_keys=True)
    return {_METADATA_KEY: json.dumps({"digest": _sha256(text), "header": text}, sort_keys=True)}


class UpdateFile(Mapping[str, Tensor]):
    """The tensors of a file, each read when asked for and checked against its digest.

    Attributes:
        header: what the tensors mean.
        shapes: of the tensors, by name.
        dtypes: of the tensors, by name.
        digests: of the tensors, by name.
        digest: of the header, which holds those: of all there is in the file.
        size: of the file, in bytes.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file and checks its header; reads no tensor.

        Args:
            path: of the file.

        Raises:
            FileNotFoundError: if there is no such file.
            UpdateError: if it is truncated, no update or of another schema.
        """
        if not path.is_file():
            raise FileNotFoundError(f"there is no update file {path}")
        self._path = path
        self._handle: Any = None
        try:
            self.size = path.stat().st_size
            _require_sane(path)
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if len(file.keys()) > _MOST_TENSORS:
                    reason = f"it holds {len(file.keys())} tensors, more than {_MOST_TENSORS}"
                    raise UpdateError(str(path), [reason])
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
                types = {name: part.get_dtype() for name, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise UpdateError(str(path), [f"it is truncated or damaged: {error}"]) from error
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
            for name in sorted(self.digests.keys() ^ self.shapes.keys())
        ]
        for name, found in types.items():
            allowed = _BUFFER_TYPES if name.startswith("buffers/") else _FLOATS
            if name in self.header.quantized:
                allowed = _BYTES
            if found not in allowed:
                offenders.append(f"{name} is of type {found}, not of {', '.join(sorted(allowed))}")
            if not is_possible(self.shapes[name]):
                offenders.append(f"{name} has an impossible shape")
        if offenders:
            raise UpdateError(str(path), offenders)
        self.dtypes = {name: _BUFFER_TYPES[found] for name, found in types.items()}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        try:
            with self.at_once():
                tensor: Tensor = self._handle.get_tensor(name)
        except UpdateError as error:
            reasons = "; ".join(error.offenders)
            raise UpdateError(str(self._path), [f"{name} cannot be read: {reasons}"]) from error
        except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise UpdateError(str(self._path), [f"{name} cannot be read: {error}"]) from error
        if self.digests.get(name) != digest(tensor):
            raise UpdateError(
                str(self._path), [f"{name} does not match its digest: the file is damaged"]
            )
        return tensor

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Keeps the file open, to read more than one tensor: opening reads all of the header."""
        if self._handle is not None:
            yield
            return
        try:
            file = safe_open(self._path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UpdateError(str(self._path), [f"it cannot be read any more: {error}"]) from error
        with file as self._handle:
            try:
                yield
            finally:
                self._handle = None

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _require_sane(path: Path) -> None:
    """Refuses a file by its size and the size of its header, before either is read."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > _MOST_HEADER:
        reason = f"it is truncated or damaged: a header of {size} bytes, more than {_MOST_HEADER}"
        raise UpdateError(str(path), [reason])


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes.

    Args:
        tensor: on the CPU.

    Returns:
        In hexadecimal.
    """
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
