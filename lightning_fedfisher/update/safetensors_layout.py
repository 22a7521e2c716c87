"""The layout of a safetensors file, read once and trusted in nothing.

Eight bytes hold the length of a JSON header. The header says type, shape and position of every
tensor, and the tensors' bytes follow without a gap. https://github.com/huggingface/safetensors
describes it. The library's own reader parses the header each time a file is opened and maps the
file into memory, where a file that somebody cuts off ends the process. Here the header is parsed
once, and a tensor costs one read at a known position.
"""

from __future__ import annotations

import json
import math
import os
import stat
import threading
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from lightning_fedfisher.update.tensor_checks import is_possible

MAX_HEADER_BYTES = 2**24
"""Longest header that is read: 1 KiB for each tensor that a file may hold."""

MAX_TENSORS = 2**14
"""Most tensors that a file may hold: more than any model has."""

MAX_NAME = 2**10
"""Longest name, in characters, of a tensor or of anything else that a file names."""

DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types that an update may hold, by their names in a file, in the order in which they lie there."""

_MAX_VALUES = 32 * MAX_TENSORS  # of a header: each takes memory, however short it is
_LENGTH_BYTES = 8  # of the number in front of the header
_ALIGNMENT = 8  # spaces fill the header up to a multiple of it
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
_POSITION = threading.Lock()  # where a system cannot read at a position without moving there first

Spec = tuple[tuple[int, ...], torch.dtype]
"""Shape and type of a tensor."""


def spec_bytes(spec: Spec) -> int:
    """Counts the bytes of a tensor."""
    shape, dtype = spec
    return math.prod(shape) * dtype.itemsize


class Slot(NamedTuple):
    """Where a tensor lies in a file.

    Attributes:
        shape: Shape of the tensor.
        dtype: Type of the tensor.
        start: Position of its first byte in the file.
        size: Number of its bytes.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    size: int


def open_regular(path: Path) -> FileIO:
    """Opens a stranger's file to read bytes, and nothing that only looks like a file.

    Args:
        path: Path of the file. A pipe is not waited for.

    Returns:
        The open file.

    Raises:
        OSError: If it cannot be opened, or is a folder, a pipe, a device or the like.
        ValueError: If it is no path at all.
    """
    # A pipe would keep its reader waiting for a writer, and may be put in the file's place later.
    wait = getattr(os, "O_NONBLOCK", 0)
    file = FileIO(os.fspath(path), opener=lambda name, flags: os.open(name, flags | wait))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("it is no regular file")
    return file


def parse_json(text: str) -> Any:
    """Reads a stranger's JSON, of which nothing is named twice.

    Args:
        text: The JSON.

    Returns:
        What it says: tables, lists, texts, numbers, true, false and null.

    Raises:
        ValueError: If it is no JSON, holds more values than any header, or what is no JSON number.
        RecursionError: If it is nested too deeply.
    """
    if sum(map(text.count, "[{,")) > _MAX_VALUES:
        raise ValueError(f"a header of more than {_MAX_VALUES} values")
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)


def read_layout(file: FileIO) -> tuple[dict[str, str], dict[str, Slot]]:
    """Reads the header of a safetensors file, and no tensor.

    Args:
        file: A file from a stranger, opened to read bytes.

    Returns:
        The metadata of the file, and where each tensor lies, by name. The tensors' bytes follow
        each other without gaps or overlaps and end with the file.

    Raises:
        ValueError: If the file is cut off or no safetensors file, or holds a tensor that no update
            may hold.
        RecursionError: If the header is nested too deeply.
        OSError: If the file cannot be read.
    """
    end = os.fstat(file.fileno()).st_size
    length = int.from_bytes(bytes(read_bytes(file, 0, _LENGTH_BYTES).tolist()), "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes, more than {MAX_HEADER_BYTES}")
    text = read_bytes(file, _LENGTH_BYTES, length).numpy().tobytes().decode()
    if not text.startswith("{"):
        raise ValueError("its header is no table")
    header = parse_json(text)
    metadata = header.pop(_METADATA, {})
    if type(metadata) is not dict or any(type(value) is not str for value in metadata.values()):
        raise ValueError("its metadata are no table of texts")
    if len(header) > MAX_TENSORS:
        raise ValueError(f"it holds {len(header)} tensors, more than {MAX_TENSORS}")
    first = _LENGTH_BYTES + length
    slots = {name: _slot(name, fields, first) for name, fields in header.items()}
    position = first
    for name, slot in sorted(slots.items(), key=lambda item: item[1][2:]):
        if slot.start != position:
            raise ValueError(f"{name} does not begin where the tensor before it ends")
        position += slot.size
    if position != end:
        raise ValueError(f"its tensors end at byte {position}, the file at {end}")
    return metadata, slots


def read_bytes(file: FileIO, start: int, size: int) -> Tensor:
    """Reads bytes at a position of a file.

    The file's own position does not matter and is not shared, so that threads and forked processes
    can read the same open file.

    Args:
        file: A file opened to read bytes.
        start: Position of the first byte.
        size: Number of bytes.

    Returns:
        The bytes, ``uint8`` of shape ``(size,)``, in memory of their own.

    Raises:
        ValueError: If the file ends before.
        OSError: If the file cannot be read.
    """
    if start + size > os.fstat(file.fileno()).st_size:  # before memory is taken for it
        raise ValueError("the file is cut off")
    tensor = torch.empty(size, dtype=torch.uint8)
    rest = tensor.numpy().data
    while rest:
        if hasattr(os, "preadv"):
            count = os.preadv(file.fileno(), [rest], start)
        else:
            with _POSITION:
                file.seek(start)
                count = file.readinto(rest) or 0
        if not count:
            raise ValueError("the file is cut off")
        rest, start = rest[count:], start + count
    return tensor


def layout_size(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> int:
    """Computes the size of the file that ``safetensors.torch.save_file`` would write.

    Args:
        specs: Shape and type of each tensor, by name.
        metadata: Texts that the file holds besides.

    Returns:
        The number of bytes; nothing is written, and no tensor is needed.
    """
    header: dict[str, object] = {_METADATA: dict(metadata)}
    position = 0
    for name, (shape, dtype) in sorted(specs.items(), key=lambda item: (_RANKS[item[1][1]], item)):
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
    length = -(-len(text.encode()) // _ALIGNMENT) * _ALIGNMENT
    return _LENGTH_BYTES + length + position


def _slot(name: str, fields: Any, first: int) -> Slot:
    """Reads a stranger's word on one tensor, whose bytes are counted from ``first``."""
    if len(name) > MAX_NAME:
        raise ValueError(f"a name of {len(name)} characters, more than {MAX_NAME}")
    name.encode()  # half of a pair of surrogates is no text
    if type(fields) is not dict or fields.keys() != _FIELDS:
        raise ValueError(f"{name} is described by other fields than {', '.join(sorted(_FIELDS))}")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        raise ValueError(f"{name} is of type {str(dtype)[:16]}, not of {', '.join(sorted(DTYPES))}")
    for numbers in (shape, offsets):
        if type(numbers) is not list or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"{name} has a shape or a position that is no list of whole numbers")
    if not is_possible(shape):
        raise ValueError(f"{name} has an impossible shape")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != size:
        raise ValueError(f"{name} takes another number of bytes than its shape")
    return Slot(tuple(shape), DTYPES[dtype], first + offsets[0], size)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a table of what must not name anything twice."""
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("its header names something twice")
    return table


def _refuse(constant: str) -> NoReturn:
    """Refuses what Python takes for JSON and nobody else does."""
    raise ValueError(f"its header holds {constant}")
