"""Whole numbers as few bytes: their lowest bits as they are, the rest in zlib's Huffman code.

The numbers a quantiser gives are many and small with few large ones among them. Numbers are folded
(0, -1, 1, -2 ... become 0, 1, 2, 3 ...); of each, as many low bits are kept apart as leave a byte
that is worth coding, and what no byte can hold is listed.
"""

from __future__ import annotations

import heapq
import struct
import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LARGEST = 2**23
"""The largest number that can be packed, in size: float32 holds every whole number up to it."""

_ESCAPE = 255  # stands for a number that is listed instead
_PREFIX = struct.Struct("<BI")  # low bits of each number, numbers listed
_LISTED = np.dtype("<u4")
_SKEWED = 2.5  # bits a number below which Huffman's code is told from the entropy
_JUDGED = 2**16
_RAW = -15  # zlib's largest window, without a header

_Folded = NDArray[np.uint32]


def pack(numbers: Tensor) -> Tensor:
    """Writes whole numbers as bytes.

    Args:
        numbers: integers of any shape, none larger in size than `LARGEST`.

    Returns:
        The bytes, ``uint8``; always the same for the same numbers.
    """
    folded = _fold(numbers)
    low, _ = _cheapest(folded)
    high = folded >> low
    listed = folded[high >= _ESCAPE].astype(_LISTED)
    planes = [np.packbits((folded >> bit & 1).astype(np.uint8)) for bit in range(low)]
    # Huffman's code alone: no code is shorter than a bit, which bounds what a file can become.
    coder = zlib.compressobj(9, zlib.DEFLATED, _RAW, 9, zlib.Z_HUFFMAN_ONLY)
    coded = coder.compress(np.minimum(high, _ESCAPE).astype(np.uint8).tobytes()) + coder.flush()
    parts = [_PREFIX.pack(low, len(listed)), listed.tobytes(), *map(bytes, planes), coded]
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def unpack(payload: Tensor, count: int) -> Tensor:
    """Reads whole numbers from bytes that a stranger wrote.

    Args:
        payload: as `pack` returns it.
        count: how many numbers there must be.

    Returns:
        The numbers, ``int32``, in one dimension.

    Raises:
        ValueError: if the bytes are not those of so many numbers. Nothing larger than 32 times the
            payload is allocated before that is known.
    """
    raw = payload.contiguous().numpy().tobytes()
    if len(raw) < _PREFIX.size:
        raise ValueError("its packed bytes are cut off")
    low, listed = _PREFIX.unpack_from(raw)
    plane = -(-count // 8)
    first = _PREFIX.size + listed * _LISTED.itemsize
    coded = raw[first + low * plane :]
    if low > LARGEST.bit_length() + 1 or listed > count or count > 8 * len(coded):
        raise ValueError(f"its packed bytes are too few for {count} numbers")
    decoder = zlib.decompressobj(_RAW)
    try:
        high = np.frombuffer(decoder.decompress(coded, count + 1), np.uint8)
    except zlib.error as error:
        raise ValueError(f"its packed bytes are damaged ({error})") from error
    large = high == _ESCAPE
    if len(high) != count or not decoder.eof or decoder.unused_data or large.sum() != listed:
        raise ValueError(f"its packed bytes do not hold {count} numbers")
    folded = high.astype(np.uint32) << low
    for bit in range(low):
        bits = np.frombuffer(raw, np.uint8, plane, first + bit * plane)
        folded |= np.unpackbits(bits, count=count).astype(np.uint32) << bit
    folded[large] = np.frombuffer(raw, _LISTED, listed, _PREFIX.size)
    if count and folded.max() > 2 * LARGEST:
        raise ValueError("its packed bytes hold a number that is too large")
    return torch.from_numpy((folded >> 1).astype(np.int32) ^ -(folded & 1).astype(np.int32))


def packed_size(numbers: Tensor) -> float:
    """Bytes that `pack` would take, to about a hundredth, without packing.

    Args:
        numbers: integers of any shape.

    Returns:
        The bytes.
    """
    _, bits = _cheapest(_fold(numbers))
    return _PREFIX.size + bits / 8


def _fold(numbers: Tensor) -> _Folded:
    flat = numbers.flatten().to(torch.int32).numpy()
    return (flat << 1 ^ flat >> 31).view(np.uint32)


def _cheapest(folded: _Folded) -> tuple[int, float]:
    """How many low bits to keep apart, and the bits that all takes; judged by some of many."""
    low = max(int(folded.max(initial=0)).bit_length() - 8, 0)
    some = folded[:: max(len(folded) // _JUDGED, 1)]
    best = low, _bits(some, low)
    while low and (bits := _bits(some, low - 1)) <= best[1]:
        low -= 1
        best = low, bits
    return best[0], best[1] * len(folded) / max(len(some), 1)


def _bits(folded: _Folded, low: int) -> float:
    counts = np.bincount(np.minimum(folded >> low, _ESCAPE), minlength=_ESCAPE + 1)
    some = counts[counts > 0]
    coded = float(-(some * np.log2(some / max(len(folded), 1))).sum())
    if coded < _SKEWED * len(folded):
        coded = float(_huffman(some.tolist()))
    return len(folded) * low + coded + 8 * _LISTED.itemsize * int(counts[_ESCAPE])


def _huffman(counts: list[int]) -> int:
    """Bits of a text in Huffman's code, by how often each symbol stands in it."""
    if len(counts) == 1:
        return counts[0]  # a symbol takes a bit at least
    heapq.heapify(counts)
    total = 0
    while len(counts) > 1:
        rarest = heapq.heappop(counts)
        total += rarest + counts[0]
        heapq.heapreplace(counts, rarest + counts[0])
    return total
