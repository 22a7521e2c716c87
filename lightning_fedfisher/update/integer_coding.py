"""Coding of integers in few bytes: low bits as they are, the rest in zlib's Huffman code.

A quantizer gives many small numbers and few large ones. So many low bits of each are kept apart
that a signed byte is left which is worth coding; a number that no byte can hold is listed.
"""

from __future__ import annotations

import heapq
import math
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LARGEST = 2**23
"""Largest absolute value that can be coded: float32 holds every integer up to it."""

_HIGHEST = 127  # of what is left above the low bits
_ESCAPE = -128  # stands for a number that is listed instead
_PREFIX = struct.Struct("<BI")  # low bits of each number, numbers listed
_LISTED = np.dtype("<i4")
_MOST_LOW = LARGEST.bit_length() - _HIGHEST.bit_length()
_WIDTHS = (8, 8, 4, 2, 1)  # of the fields that low bits are stored in
# Bits a number below which the size of Huffman's code is computed rather than taken for the
# entropy: no symbol takes less than a bit.
_FEW_BITS = 2.5
# Bits by which Huffman's code is longer than the entropy where bits are many, and those that its
# tables take for each symbol of the numbers coded alike; and bits by which the entropy of a sample
# is too small for each symbol in it (Miller & Madow, 1955).
_REDUNDANCY, _TABLES, _BIAS = 0.025, 5 / 2**15, 0.5 / math.log(2)
_SAMPLED = 2**16  # numbers by which the best number of low bits is chosen
_CHUNK = 2**15  # numbers that are worked on at a time: they stay in a processor's cache
_RAW = -15  # zlib's largest window, without a header

_Bytes = NDArray[np.uint8]
_Integers = NDArray[np.int32]


def encode(numbers: Tensor) -> Tensor:
    """Writes integers as bytes.

    Args:
        numbers: Integers of any shape, none larger in absolute value than `LARGEST`. Those that
            are alike should be near each other.

    Returns:
        The bytes, ``uint8`` in one dimension; always the same for the same numbers.

    Example:
        >>> payload = encode(torch.tensor([3, 0, -1]))
        >>> decode(payload, count=3)
        tensor([ 3,  0, -1], dtype=torch.int32)
    """
    flat = numbers.flatten().to(torch.int32).numpy()
    low, _ = _cheapest(flat[None, :: max(len(flat) // _SAMPLED, 1)])
    fields = [(shift, width, np.empty(len(flat), np.uint8)) for shift, width in _fields(low)]
    # Huffman's code alone: no code is shorter than a bit, which bounds what a file can become.
    coder = zlib.compressobj(9, zlib.DEFLATED, _RAW, 9, zlib.Z_HUFFMAN_ONLY)
    listed, coded = [], []
    for start in range(0, len(flat), _CHUNK):
        some = slice(start, start + _CHUNK)
        high = flat[some] >> low
        large = np.abs(high) > _HIGHEST
        listed.append(flat[some][large].astype(_LISTED))
        high[large] = _ESCAPE
        coded.append(coder.compress(high.astype(np.int8).data))
        for shift, _, field in fields:
            field[some] = (flat[some] >> shift).astype(np.uint8)
    parts = [
        _PREFIX.pack(low, sum(map(len, listed))),
        *(large.tobytes() for large in listed),
        *(_pack(field, width).tobytes() for _, width, field in fields),
        *coded,
        coder.flush(),
    ]
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def decode(payload: Tensor, count: int) -> Tensor:
    """Reads integers from bytes that a stranger wrote.

    Args:
        payload: Bytes as `encode` returns them.
        count: How many numbers there must be.

    Returns:
        The numbers, ``int32`` of shape ``(count,)``.

    Raises:
        ValueError: If the bytes are not those of so many numbers. Nothing larger than 32 times the
            payload is allocated before that is known.

    Example:
        >>> decode(encode(torch.tensor([7])), count=2)
        Traceback (most recent call last):
        ValueError: its packed bytes do not hold 2 numbers
    """
    raw: _Bytes = payload.contiguous().numpy()
    if len(raw) < _PREFIX.size:
        raise ValueError("its packed bytes are cut off")
    low, listed = _PREFIX.unpack_from(raw.data)
    if low > _MOST_LOW or listed > count:
        raise ValueError(f"its packed bytes are too few for {count} numbers")
    position = _PREFIX.size + listed * _LISTED.itemsize
    fields = []
    for shift, width in _fields(low):
        fields.append((shift, width, position))
        position += _packed_size(count, width)
    coded = raw[position:]
    if count > 8 * len(coded):
        raise ValueError(f"its packed bytes are too few for {count} numbers")
    decoder = zlib.decompressobj(_RAW)
    try:
        high = np.frombuffer(decoder.decompress(coded.data, count + 1), np.int8)
    except zlib.error as error:
        raise ValueError(f"its packed bytes are damaged ({error})") from error
    if len(high) != count or not decoder.eof or decoder.unused_data:
        raise ValueError(f"its packed bytes do not hold {count} numbers")
    large = np.flatnonzero(high == _ESCAPE)
    if len(large) != listed:
        raise ValueError(f"its packed bytes do not hold {count} numbers")
    planes = [(shift, _unpack(raw[first:], width, count)) for shift, width, first in fields]
    numbers = np.empty(count, np.int32)
    for start in range(0, count, _CHUNK):
        some = slice(start, start + _CHUNK)
        found = np.left_shift(high[some], low, out=numbers[some], dtype=np.int32)
        for shift, plane in planes:
            found |= np.left_shift(plane[some], shift, dtype=np.int32)
    numbers[large] = np.frombuffer(raw, _LISTED, listed, _PREFIX.size)
    if count and (numbers.max() > LARGEST or numbers.min() < -LARGEST):
        raise ValueError("its packed bytes hold a number that is too large")
    return torch.from_numpy(numbers)


def encoded_size(numbers: Tensor) -> float:
    """Estimates the bytes that `encode` would take, to about a hundredth, without coding.

    Args:
        numbers: Integers in one dimension or two. Those of a row are taken to be coded alike.

    Returns:
        The number of bytes.

    Example:
        >>> round(encoded_size(torch.zeros(8000, dtype=torch.int32)))  # a bit for each
        1005
    """
    _, bits = _cheapest(np.atleast_2d(numbers.to(torch.int32).numpy()))
    return _PREFIX.size + bits / 8


def _fields(low: int) -> Iterator[tuple[int, int]]:
    """Splits low bits into fields of which a byte holds one, two, four or eight.

    Yields:
        The first bit and the number of bits of each field.
    """
    shift = 0
    for width in _WIDTHS:
        if low - shift >= width:
            yield shift, width
            shift += width


def _packed_size(count: int, width: int) -> int:
    """Counts the bytes of so many fields."""
    return -(-count * width // 8)


def _pack(field: _Bytes, width: int) -> _Bytes:
    """Packs the lowest bits of bytes: those of the first part of them, above them the next ..."""
    if width == 8:
        return field
    size, mask = _packed_size(len(field), width), (1 << width) - 1
    packed = np.zeros(size, np.uint8)
    for part in range(8 // width):
        some = field[part * size : (part + 1) * size]
        packed[: len(some)] |= (some & mask) << part * width
    return packed


def _unpack(raw: _Bytes, width: int, count: int) -> _Bytes:
    """Undoes `_pack` for so many bytes."""
    size, mask = _packed_size(count, width), (1 << width) - 1
    if width == 8:
        return raw[:size]
    field = np.empty(count, np.uint8)
    for part in range(8 // width):
        some = field[part * size : (part + 1) * size]
        np.right_shift(raw[: len(some)], part * width, out=some)
    field &= mask
    return field


def _cheapest(rows: _Integers) -> tuple[int, float]:
    """Chooses how many low bits to keep apart, and estimates the bits of all numbers."""
    largest = max(int(rows.max(initial=0)), -int(rows.min(initial=0)))
    low = max(largest.bit_length() - _HIGHEST.bit_length(), 0)
    best = low, _bits(rows, low)
    while low and (bits := _bits(rows, low - 1)) <= best[1]:
        low -= 1
        best = low, bits
    return best


def _bits(rows: _Integers, low: int) -> float:
    """Estimates the bits of numbers of which so many low bits are kept apart."""
    symbols = (rows >> low).clip(_ESCAPE, _HIGHEST + 1) - _ESCAPE
    symbols[symbols > _HIGHEST - _ESCAPE] = 0
    symbols += 256 * np.arange(len(rows), dtype=np.int32)[:, None]
    counts = np.bincount(symbols.ravel(), minlength=256 * len(rows)).reshape(len(rows), 256)
    coded = 0.0
    for row in counts:
        some = row[row > 0]
        entropy = float(-(some * np.log2(some / rows.shape[1])).sum()) + _BIAS * len(some)
        if entropy < _FEW_BITS * rows.shape[1]:
            coded += _huffman([*some.tolist(), 1])  # the last one ends the text
        else:
            coded += entropy + (_REDUNDANCY + _TABLES * len(some)) * rows.shape[1]
    return rows.size * low + coded + 8 * _LISTED.itemsize * int(counts[:, 0].sum())


def _huffman(counts: list[int]) -> int:
    """Counts the bits of a text in Huffman's code, by how often each symbol stands in it."""
    heapq.heapify(counts)
    total = 0
    while len(counts) > 1:
        rarest = heapq.heappop(counts)
        total += rarest + counts[0]
        heapq.heapreplace(counts, rarest + counts[0])
    return total
