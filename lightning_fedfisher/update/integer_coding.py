"""Coding of integers in few bytes: low bits as they are, the rest in zlib's Huffman code.

A quantizer gives many small numbers and few large ones. Numbers are folded (0, -1, 1, -2 ... become
0, 1, 2, 3 ...). So many low bits of each are kept apart that a byte is left which is worth coding;
a number that no byte can hold is listed.
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
"""Largest absolute value that can be coded: float32 holds every integer up to it."""

_ESCAPE = 255  # stands for a number that is listed instead
_PREFIX = struct.Struct("<BI")  # low bits of each number, numbers listed
_LISTED = np.dtype("<u4")
# Bits a number below which the size of Huffman's code is computed rather than taken for the
# entropy: no symbol takes less than a bit.
_FEW_BITS = 2.5
_SAMPLED = 2**16  # numbers by which the best number of low bits is chosen
_RAW = -15  # zlib's largest window, without a header

_Folded = NDArray[np.uint32]


def encode(numbers: Tensor) -> Tensor:
    """Writes integers as bytes.

    Args:
        numbers: Integers of any shape, none larger in absolute value than `LARGEST`.

    Returns:
        The bytes, ``uint8`` in one dimension; always the same for the same numbers.

    Example:
        >>> payload = encode(torch.tensor([3, 0, -1]))
        >>> decode(payload, count=3)
        tensor([ 3,  0, -1], dtype=torch.int32)
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


def encoded_size(numbers: Tensor) -> float:
    """Estimates the bytes that `encode` would take, to about a hundredth, without coding.

    Args:
        numbers: Integers of any shape.

    Returns:
        The number of bytes.

    Example:
        >>> round(encoded_size(torch.zeros(8000, dtype=torch.int32)))  # a bit for each
        1005
    """
    _, bits = _cheapest(_fold(numbers))
    return _PREFIX.size + bits / 8


def _fold(numbers: Tensor) -> _Folded:
    """Maps integers to integers that are not negative, small ones to small ones."""
    flat = numbers.flatten().to(torch.int32).numpy()
    return (flat << 1 ^ flat >> 31).view(np.uint32)


def _cheapest(folded: _Folded) -> tuple[int, float]:
    """Chooses how many low bits to keep apart, and estimates the bits of all, by some of many."""
    low = max(int(folded.max(initial=0)).bit_length() - 8, 0)
    some = folded[:: max(len(folded) // _SAMPLED, 1)]
    best = low, _bits(some, low)
    while low and (bits := _bits(some, low - 1)) <= best[1]:
        low -= 1
        best = low, bits
    return best[0], best[1] * len(folded) / max(len(some), 1)


def _bits(folded: _Folded, low: int) -> float:
    """Estimates the bits of numbers of which so many low bits are kept apart."""
    counts = np.bincount(np.minimum(folded >> low, _ESCAPE), minlength=_ESCAPE + 1)
    some = counts[counts > 0]
    coded = float(-(some * np.log2(some / max(len(folded), 1))).sum())
    if coded < _FEW_BITS * len(folded):
        coded = float(_huffman(some.tolist()))
    return len(folded) * low + coded + 8 * _LISTED.itemsize * int(counts[_ESCAPE])


def _huffman(counts: list[int]) -> int:
    """Counts the bits of a text in Huffman's code, by how often each symbol stands in it."""
    if len(counts) == 1:
        return counts[0]  # a symbol takes a bit at least
    heapq.heapify(counts)
    total = 0
    while len(counts) > 1:
        rarest = heapq.heappop(counts)
        total += rarest + counts[0]
        heapq.heapreplace(counts, rarest + counts[0])
    return total
