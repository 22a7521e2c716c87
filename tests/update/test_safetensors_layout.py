"""The layout of a file: as safetensors writes and reads it, and never more lenient."""

import json
import math
import os
import random
import struct
from pathlib import Path

import pytest
import torch
from helpers.small_updates import linear, update_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

from lightning_fedfisher import ClientUpdate, UpdateError
from lightning_fedfisher.update import UpdateHeader
from lightning_fedfisher.update.file_format import file_size, write_file
from lightning_fedfisher.update.safetensors_layout import (
    DTYPES,
    MAX_NAME,
    layout_size,
    open_regular,
    parse_json,
    read_bytes,
    read_layout,
)

QUIET = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
SPECS = st.dictionaries(
    NAMES.filter(lambda name: name != "__metadata__"),
    st.tuples(
        st.lists(st.integers(0, 5), max_size=4).map(tuple), st.sampled_from([*DTYPES.values()])
    ),
    max_size=12,
)


def _zeros(specs):
    return {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in specs.items()}


def _read(path, data):
    path.write_bytes(data)
    with path.open("rb", buffering=0) as file:
        metadata, slots = read_layout(file)
        return metadata, slots, {n: read_bytes(file, s.start, s.size) for n, s in slots.items()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


@QUIET
@given(specs=SPECS, metadata=st.dictionaries(NAMES, NAMES, min_size=1, max_size=2))
def test_a_size_is_foretold_to_the_byte_and_what_is_written_is_read(specs, metadata, path):
    data = save(_zeros(specs), metadata)
    assert layout_size(specs, metadata) == len(data)
    found, slots, _ = _read(path, data)
    assert found == metadata
    assert {name: (slot.shape, slot.dtype) for name, slot in slots.items()} == specs


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 99, 1000])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_a_size_is_foretold_for_any_number_of_digits(dtype, count, path):
    tensors = {f"buffers/{n}": torch.zeros(n % 40, dtype=dtype) for n in range(count)}
    tensors['parameters/größe\n"\\\u2028'] = torch.zeros(3, 2)
    tensors["parameters/scalar"] = torch.zeros((), dtype=torch.bfloat16)
    header = UpdateHeader(
        7, "identity", "", "categorical", 0, (), {}, metadata={"город": 'a "b"\\\n\t\x00\x7f🐟'}
    )
    write_file(path, header, tensors)
    specs = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    assert file_size(header, specs) == path.stat().st_size


def test_values_come_back_bit_by_bit(path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 2, (3, 5), generator=generator).to(dtype)
        for name, dtype in DTYPES.items()
    }
    _, slots, found = _read(path, save(tensors))
    for name, tensor in tensors.items():
        assert torch.equal(found[name].view(slots[name].dtype).reshape(3, 5), tensor)


# Refusals

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "U8", "shape": [4], "data_offsets": [8, 12]}


def _bytes(head, body=bytes(12)):
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + body


def test_the_files_of_these_tests_are_sound_but_for_the_fault(path):
    _, slots, found = _read(path, _bytes({"b": B, "a": A}))
    assert [slots[name].size for name in "ab"] == [8, 4] == [len(found[name]) for name in "ab"]
    assert _read(path, _bytes({"b": B, "a": A, "__metadata__": {"k": "v"}}))[0] == {"k": "v"}


FAULTS = {
    "empty": (b"", "cut off"),
    "length cut off": (bytes(7), "cut off"),
    "header cut off": (struct.pack("<Q", 50) + b"{}", "cut off"),
    "no header": (bytes(8), "no table"),
    "a list": (_bytes([]), "no table"),
    "space before": (_bytes(b" {}", b""), "no table"),
    "a tail": (_bytes(b"{}{}", b""), "Extra data"),
    "not text": (_bytes(b'{"\xff": 1}'), "utf-8"),
    "not a number": (_bytes(b'{"a": NaN}'), "holds NaN"),
    "infinite": (_bytes(b'{"a": -Infinity}'), "holds -Infinity"),
    "too many digits": (_bytes(b'{"a": %s}' % (b"9" * 5000)), "digits"),
    "twice": (_bytes(b'{"a": 1, "a": 2}'), "twice"),
    "field twice": (_bytes(b'{"a": {"dtype": "F32", "dtype": "F32"}}'), "twice"),
    "half a character": (_bytes({"\ud800": A, "b": B}), "surrogates"),
    "metadata a list": (_bytes({"__metadata__": []}, b""), "metadata"),
    "metadata of numbers": (_bytes({"__metadata__": {"k": 1}}, b""), "metadata"),
    "a number": (_bytes({"a": 1, "b": B}), "a is described by other fields"),
    "field missing": (_bytes({"a": {"dtype": "F32", "shape": [2]}, "b": B}), "other fields"),
    "field more": (_bytes({"a": A | {"x": 1}, "b": B}), "other fields"),
    "type unknown": (_bytes({"a": A | {"dtype": "C64"}, "b": B}), "a is of type C64"),
    "type null": (_bytes({"a": A | {"dtype": None}, "b": B}), "a is of type None"),
    "type a list": (_bytes({"a": A | {"dtype": [[]]}, "b": B}), "a is of type"),
    "shape a number": (_bytes({"a": A | {"shape": 2}, "b": B}), "whole numbers"),
    "shape a text": (_bytes({"a": A | {"shape": "2"}, "b": B}), "whole numbers"),
    "size negative": (_bytes({"a": A | {"shape": [-2, -1]}, "b": B}), "whole numbers"),
    "size true": (_bytes({"a": A | {"shape": [2, True]}, "b": B}), "whole numbers"),
    "size with a point": (_bytes({"a": A | {"shape": [2.0]}, "b": B}), "whole numbers"),
    "offset negative": (_bytes({"a": A | {"data_offsets": [-8, 0]}, "b": B}), "whole numbers"),
    "one offset": (_bytes({"a": A | {"data_offsets": [8]}, "b": B}), "another number of bytes"),
    "three offsets": (_bytes({"a": A | {"data_offsets": [0, 8, 8]}, "b": B}), "another number"),
    "reversed": (_bytes({"a": A | {"data_offsets": [8, 0]}, "b": B}), "another number"),
    "too short": (_bytes({"a": A | {"data_offsets": [0, 4]}, "b": B}), "another number"),
    "overlap": (_bytes({"a": A, "b": B | {"data_offsets": [4, 8]}}), "b does not begin where"),
    "same place": (_bytes({"a": A, "b": A}), "b does not begin where"),
    "gap": (_bytes({"a": A, "b": B | {"data_offsets": [9, 13]}}, bytes(13)), "does not begin"),
    "gap before": (_bytes({"b": B}), "b does not begin where"),
    "bytes missing": (_bytes({"a": A, "b": B}, bytes(11)), "tensors end at byte"),
    "bytes left": (_bytes({"a": A, "b": B}, bytes(13)), "tensors end at byte"),
    "size huge": (_bytes({"a": A | {"shape": [0, 2**60]}, "b": B}), "impossible shape"),
    "too many sizes": (_bytes({"a": A | {"shape": [1] * 17}, "b": B}), "impossible shape"),
    "number huge": (
        _bytes(b'{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 8]}}' % (b"9" * 4000)),
        "impossible shape",
    ),
}


@pytest.mark.parametrize(("data", "reason"), FAULTS.values(), ids=FAULTS)
def test_a_layout_that_is_not_sound_is_refused(data, reason, path):
    with pytest.raises(ValueError, match=reason):
        _read(path, data)


@pytest.mark.parametrize("text", [b'{"a":' * 100_000, b'{"a":' + b"[" * 100_000])
def test_depth_is_refused(text, path):
    with pytest.raises((RecursionError, ValueError)):
        _read(path, _bytes(text))


def test_nothing_is_allocated_beyond_the_file(path):
    path.write_bytes(bytes(100))
    with path.open("rb", buffering=0) as file:
        with pytest.raises(ValueError, match="cut off"):
            read_bytes(file, 0, 2**60)
        with pytest.raises(ValueError, match="cut off"):
            read_bytes(file, 90, 11)
        assert len(read_bytes(file, 90, 10)) == 10


def test_bytes_are_read_where_a_system_cannot_read_at_a_position(path, monkeypatch):
    monkeypatch.delattr(os, "preadv")
    path.write_bytes(bytes(range(100)))
    with path.open("rb", buffering=0) as file:
        assert read_bytes(file, 90, 10).tolist() == list(range(90, 100))
        assert read_bytes(file, 3, 2).tolist() == [3, 4]


def test_a_read_may_come_in_pieces(path, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda file, views, start: preadv(file, [views[0][:7]], start)
    )
    path.write_bytes(bytes(range(100)))
    with path.open("rb", buffering=0) as file:
        assert read_bytes(file, 5, 90).tolist() == list(range(5, 95))


PIECES = [
    b"0",
    b"1",
    b"8",
    b"-",
    b".",
    b"e",
    b"[",
    b"]",
    b",",
    b'"',
    b"{",
    b"}",
    b" ",
    b"F16",
    b"U8",
]


@QUIET
@given(seed=st.integers(0, 2**32))
def test_what_is_accepted_is_what_safetensors_reads(seed, path):
    dice = random.Random(seed)
    text = bytearray(json.dumps({"b": B, "a": A, "__metadata__": {"k": "v"}}).encode())
    for _ in range(dice.randrange(1, 4)):
        place = dice.randrange(len(text))
        text[place : place + dice.randrange(3)] = dice.choice(PIECES)
    data = _bytes(bytes(text))
    try:
        _, slots, found = _read(path, data)
    except (ValueError, RecursionError):
        return
    try:
        theirs = dict(deserialize(data))
    except SafetensorError as error:
        raise AssertionError(f"{bytes(text)} is refused: {error}") from error
    assert theirs.keys() == slots.keys()
    for name, slot in slots.items():
        assert tuple(theirs[name]["shape"]) == slot.shape
        assert DTYPES[theirs[name]["dtype"]] == slot.dtype
        assert bytes(theirs[name]["data"]) == found[name].numpy().tobytes()
        assert slot.size == math.prod(slot.shape) * slot.dtype.itemsize


# What only looks like a file, and JSON that is more than it seems


def _pipe(path):
    os.mkfifo(path)
    return path


NO_FILES = {
    "folder": lambda path: path.parent,
    "pipe": _pipe,
    "device": lambda path: Path("/dev/zero"),
    "link to a device": lambda path: (path.symlink_to("/dev/zero"), path)[1],
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("what", NO_FILES)
def test_what_is_no_regular_file_is_refused_and_not_waited_for(what, path):
    made = NO_FILES[what](path)
    with pytest.raises(OSError, match=r"it is no regular file|Is a directory"):
        open_regular(made)
    with pytest.raises(UpdateError, match="it cannot be read: ") as error:
        ClientUpdate.open(made)
    assert error.value.source == str(made)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(path):
    update = update_of(linear())
    opened = ClientUpdate.open(update.save(path))
    path.unlink()
    _pipe(path)
    with pytest.raises(UpdateError, match="it cannot be read any more: it is no regular file"):
        opened.verify()


@pytest.mark.parametrize("name", ["a\x00b", "\ud800", "x" * 300], ids=ascii)
def test_what_is_no_path_is_refused_by_name(name, tmp_path):
    with pytest.raises(UpdateError) as error:
        ClientUpdate.open(tmp_path / name)
    assert name in error.value.source


@pytest.mark.skipif(not os.path.isfile("/proc/self/maps"), reason="needs /proc")
@pytest.mark.parametrize("name", ["maps", "mem", "cmdline"])
def test_files_without_a_size_are_refused(name):
    with pytest.raises(UpdateError, match=f"/proc/self/{name} is not a usable"):
        ClientUpdate.open(f"/proc/self/{name}")


@pytest.mark.parametrize("where", ["header", "tensors", "behind"])
def test_holes_are_not_read(where, path):
    """As large as a file may be, and nothing is on the disk."""
    update_of(linear()).save(path)
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    with path.open("r+b") as file:
        if where == "header":
            file.write(bytes(8))
        elif where == "tensors":
            file.truncate(start)
        file.truncate(2**40)
    with pytest.raises(UpdateError, match="it is truncated or damaged") as error:
        ClientUpdate.open(path)
    assert error.value.source == str(path)


def test_values_of_a_header_are_counted_before_they_take_memory():
    assert parse_json("[" + "[]," * 1000 + "0]")[-1] == 0
    for text in ("[" + "[]," * 2**20 + "0]", "[" + "0," * 2**21 + "0]", "{" * 2**21):
        with pytest.raises(ValueError, match="a header of more than 524288 values"):
            parse_json(text)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "[NaN]", "-Infinity", '{"a": {"b": NaN}}'])
def test_json_that_others_read_otherwise_is_refused(text):
    with pytest.raises(ValueError, match="its header"):
        parse_json(text)


@pytest.mark.parametrize("length", [MAX_NAME, MAX_NAME + 1])
def test_the_length_of_a_name_is_bounded(length, path):
    entry = {"n" * length: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}
    text = json.dumps(entry).encode()
    data = struct.pack("<Q", len(text)) + text
    if length > MAX_NAME:
        with pytest.raises(ValueError, match="a name of 1025 characters, more than 1024"):
            _read(path, data)
    else:
        assert list(_read(path, data)[1]) == list(entry)
