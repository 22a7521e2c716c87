"""Integers as bytes: they come back, in few bytes, and other bytes are refused."""

import math
import zlib

import numpy as np
import pytest
import torch

from lightning_fedfisher.update import integer_coding
from lightning_fedfisher.update.integer_coding import LARGEST, decode, encode, encoded_size


def _numbers(scale, count=20001):
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(count, generator=generator, dtype=torch.float64)
    return (normal * scale).round().clamp(-LARGEST, LARGEST).to(torch.int32)


@pytest.mark.parametrize("scale", [0.0, 0.2, 1.0, 30.0, 5e3, 2e6, 1e9])
def test_numbers_come_back(scale):
    numbers = _numbers(scale)
    payload = encode(numbers)
    assert payload.dtype == torch.uint8
    assert torch.equal(decode(payload, len(numbers)), numbers)
    assert torch.equal(encode(numbers), payload)


@pytest.mark.parametrize("numbers", [[], [0], [LARGEST], [-LARGEST, LARGEST, 0, -1, 1]])
def test_few_numbers_come_back(numbers):
    assert (
        decode(encode(torch.tensor(numbers, dtype=torch.int32)), len(numbers)).tolist() == numbers
    )


def test_rare_large_numbers_cost_the_others_nothing():
    numbers = _numbers(3.0)
    alone = len(encode(numbers))
    numbers[::1000] = LARGEST
    assert torch.equal(decode(encode(numbers), len(numbers)), numbers)
    assert len(encode(numbers)) < alone + 21 * 4 + 100


@pytest.mark.parametrize("scale", [0.2, 0.5, 1.0, 2.0, 30.0, 5e3])
def test_packing_is_near_the_entropy_and_its_size_is_foretold(scale):
    numbers = _numbers(scale, 200_000)
    size = len(encode(numbers))
    if scale > 1:
        entropy = math.log2(scale * math.sqrt(2 * math.pi * math.e)) * len(numbers) / 8
        assert entropy < size < 1.03 * entropy
    assert encoded_size(numbers) == pytest.approx(size, rel=0.02)


def test_numbers_that_change_along_the_way_are_foretold_by_rows():
    rows = torch.stack([_numbers(scale, 100_000) for scale in (5.0, 20.0, 80.0)])
    size = len(encode(rows))
    assert encoded_size(rows) == pytest.approx(size, rel=0.02)
    assert encoded_size(rows.flatten()) > 1.02 * size


@pytest.mark.parametrize("low", range(18))
@pytest.mark.parametrize("count", [1, 2, 7, 9, 70_001])
def test_any_number_of_low_bits_comes_back(low, count):
    generator = torch.Generator().manual_seed(low)
    numbers = torch.randint(-(64 << low), (64 << low) + 1, (count,), generator=generator)
    assert decode(encode(numbers), count).tolist() == numbers.tolist()


def test_no_number_takes_less_than_a_bit():
    # What bounds the memory that a short payload can claim.
    assert len(encode(torch.zeros(80_000, dtype=torch.int32))) >= 10_000


@pytest.mark.parametrize("count", [0, 999, 1001, 8_000, 10**12])
def test_another_count_is_refused(count):
    with pytest.raises(ValueError, match="packed bytes"):
        decode(encode(_numbers(5.0, 1000)), count)


def _raw(low, high, after=b""):
    """Bytes as `encode` writes them, of one number and of no large ones."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    coded = coder.compress(bytes([high])) + coder.flush()
    raw = integer_coding._PREFIX.pack(low, 0) + bytes(-(-low // 8)) + coded + after
    return torch.from_numpy(np.frombuffer(raw, np.uint8).copy())


def test_bytes_after_the_last_number_are_refused():
    assert decode(_raw(0, 4), 1).tolist() == [4]
    assert decode(_raw(0, 256 - 4), 1).tolist() == [-4]
    with pytest.raises(ValueError, match="do not hold 1 numbers"):
        decode(_raw(0, 4, after=b"x"), 1)


def test_numbers_beyond_the_largest_are_refused():
    most = LARGEST.bit_length() - 7
    assert decode(_raw(most, 64), 1).tolist() == [LARGEST]
    for byte in (65, 127, 256 - 65):
        with pytest.raises(ValueError, match="a number that is too large"):
            decode(_raw(most, byte), 1)
    with pytest.raises(ValueError, match="too few"):
        decode(_raw(most + 1, 0), 1)


def test_a_bomb_is_refused_before_it_goes_off():
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = coder.compress(bytes(10**8)) + coder.flush()
    payload = torch.from_numpy(np.frombuffer(bytes(5) + bomb, np.uint8).copy())
    assert len(payload) < 200_000
    with pytest.raises(ValueError, match="too few"):
        decode(payload, 10**8)


def test_mutated_bytes_are_refused_or_are_numbers():
    numbers = _numbers(40.0, 300)
    payload = encode(numbers)
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(3000):
        changed = payload.clone()
        where = torch.randint(0, len(payload), (2,), generator=generator)
        changed[where] = torch.randint(0, 256, (2,), generator=generator, dtype=torch.uint8)
        cut = int(torch.randint(0, 3, (), generator=generator))
        changed = changed[: len(changed) - cut]
        try:
            found = decode(changed, len(numbers))
        except ValueError:
            refused += 1
            continue
        assert found.shape == numbers.shape
        assert found.dtype == torch.int32
        assert int(found.abs().max()) <= LARGEST
    assert refused > 1000
