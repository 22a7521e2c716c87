"""ClientUpdate and its file: bitwise round trips, lazy reads, and refusal of everything damaged."""

import io
import json
import os
import random
import re
import struct
from dataclasses import replace

import pytest
import torch
from helpers.small_updates import header_of, linear, update_of
from helpers.update_files import (
    ENTRY,
    MATRIX,
    METADATA,
    bits,
    content,
    forge,
    make_update,
    matrix_fields,
    read,
    reference_digest,
    refusal,
    sign,
    write_raw,
)
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_fedfisher import ClientUpdate, UpdateError
from lightning_fedfisher.curvature.diagonal import Diagonal
from lightning_fedfisher.layers import Layer, find_layers
from lightning_fedfisher.update import file_format as update_file

KINDS = ("identity", "diagonal", "kfac", "dense")


# Round trip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_bitwise(kind, dtype, tmp_path):
    model, blocks, update = make_update(kind, dtype)
    opened = ClientUpdate.open(update.save(tmp_path / "client.safetensors"))
    opened.verify()

    parameters = {name: bits(tensor) for name, tensor in model.named_parameters()}
    state = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    for one in (update, opened):
        assert {name: bits(tensor) for name, tensor in one.parameters.items()} == parameters
        sent = {name: bits(t) for name, t in (one.parameters | one.buffers).items()}
        assert sent == state
        assert one.blocks.keys() == blocks.keys()
        for name, block in blocks.items():
            assert type(one.blocks[name]) is type(block)
            assert one.blocks[name].shape == block.shape
            assert {n: bits(t) for n, t in one.blocks[name].tensors().items()} == {
                n: bits(t) for n, t in block.tensors().items()
            }
    assert opened.header == update.header
    assert opened.header.metadata == METADATA
    assert opened.layers == find_layers(model)
    assert opened.num_samples == 12
    assert opened.source == str(tmp_path / "client.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_weights_are_the_layer_as_one_matrix(dtype, tmp_path):
    model, _, update = make_update("diagonal", dtype)
    opened = ClientUpdate.open(update.save(tmp_path / "client.safetensors"))
    conv, norm, head = opened.layers
    expected = {
        conv: [model.conv.weight.reshape(3, 9), model.conv.bias[:, None]],
        norm: [model.norm.weight[:, None], model.norm.bias[:, None]],
        head: [getattr(model, "größe/头").weight, getattr(model, "größe/头").bias[:, None]],
    }
    for layer, columns in expected.items():
        assert bits(opened.weights(layer)) == bits(torch.cat(columns, dim=1))
        assert opened.block(layer).shape == layer.shape


def test_fedavg_bytes_count_weights_and_buffers_only(tmp_path):
    model, _, update = make_update("diagonal", torch.bfloat16)
    weights = sum(parameter.numel() for parameter in model.parameters())
    expected = 2 * weights + 2 * (3 + 3) + 8  # running statistics in bfloat16, one int64
    assert update.fedavg_bytes == expected
    assert ClientUpdate.open(update.save(tmp_path / "u")).fedavg_bytes == expected


def test_digest_and_size_are_those_of_the_file(tmp_path):
    model = nn.Sequential(linear(), nn.Linear(3, 2), nn.BatchNorm1d(2, affine=False))
    update = update_of(model)
    path = update.save(tmp_path / "update.safetensors")
    opened = ClientUpdate.open(path)
    assert opened.digest == update.digest
    assert opened.upload_bytes == update.upload_bytes == path.stat().st_size
    assert opened.sent_bytes("buffers") == 2 * 2 * 4 + 8
    assert opened.sent_bytes("parameters") == 24 + 8 + 24 + 8
    assert opened.layer_bytes(opened.layers[0]) == (24 + 8, 0)


def test_bytes_are_those_of_a_layer_and_of_none_whose_name_begins_alike():
    names, one = ("d.a", "d.a/b c", "d.a/values"), linear()
    layers = tuple(Layer(name, ((f"{name}.w", (2, 3)),)) for name in names)
    header = header_of(one, "diagonal", layers=layers, kinds=dict.fromkeys(names, "diagonal"))
    tensors = {f"parameters/{name}.w": torch.ones(2, 3) for name in names}
    tensors |= {f"curvature/{name}/values": torch.ones(2, 3) for name in names}
    update = ClientUpdate(header, tensors)
    assert [update.layer_bytes(layer) for layer in layers] == [(24, 24)] * 3
    assert update.sent_bytes("curvature") == update.sent_bytes("parameters") == 3 * 24


@pytest.mark.parametrize("kind", KINDS)
def test_same_update_same_bytes(kind, tmp_path):
    first = make_update(kind)[2].save(tmp_path / "first").read_bytes()
    again = make_update(kind)[2]
    assert again.save(tmp_path / "again").read_bytes() == first
    assert again.save(tmp_path / "again").read_bytes() == first
    assert read(tmp_path / "first").save(tmp_path / "copy").read_bytes() == first


def test_an_opened_update_can_be_saved_over_its_own_file(file):
    before = file.read_bytes()
    opened = ClientUpdate.open(file)
    opened.save(file)
    assert file.read_bytes() == before
    opened.verify()


def test_tensors_read_from_a_file_are_private(file):
    opened = ClientUpdate.open(file)
    before = file.read_bytes()
    layer = opened.layers[0]
    opened.parameters["conv.weight"].fill_(7)
    opened.block(layer).values.fill_(7)
    assert file.read_bytes() == before
    opened.verify()


# Lazy reading


@pytest.fixture
def reads(monkeypatch):
    """Names of the tensors read from files, in order."""
    names, found = [], {}
    read_layout, read_bytes = update_file.read_layout, update_file.read_bytes

    def layout(file):
        metadata, slots = read_layout(file)
        found.update({(slot.start, slot.size): name for name, slot in slots.items()})
        return metadata, slots

    def record(file, start, size):
        names.append(found[start, size])
        return read_bytes(file, start, size)

    monkeypatch.setattr(update_file, "read_layout", layout)
    monkeypatch.setattr(update_file, "read_bytes", record)
    return names


def test_tensors_are_read_when_asked_for_and_no_others(file, reads):
    opened = ClientUpdate.open(file)
    assert opened.num_samples == 12
    conv, _, head = opened.layers
    assert reads == []
    opened.weights(conv)
    assert sorted(reads) == ["parameters/conv.bias", "parameters/conv.weight"]
    reads.clear()
    opened.block(head)
    assert reads == ["curvature/größe/头/values"]
    reads.clear()
    assert len(opened.buffers) == 3
    assert all(name.startswith("buffers/") for name in reads)
    reads.clear()
    opened.verify()
    assert len(reads) == len(set(reads)) == len(load_file(file))


def test_damage_in_one_layer_leaves_the_others_usable(file):
    data = bytearray(file.read_bytes())
    needle = load_file(file)["parameters/conv.weight"].numpy().tobytes()
    data[data.index(needle) + 5] ^= 1
    file.write_bytes(data)
    opened = ClientUpdate.open(file)
    conv, norm, head = opened.layers
    assert opened.weights(head).isfinite().all()
    assert opened.weights(norm).isfinite().all()
    with pytest.raises(UpdateError, match=r"parameters/conv\.weight does not match its digest"):
        opened.weights(conv)
    assert len(refusal(file).splitlines()) == 2  # one offender


# Saving


def test_missing_folders_are_made_and_the_path_returned(tmp_path):
    update = make_update("dense")[2]
    path = tmp_path / "a" / "b" / "client.safetensors"
    assert update.save(str(path)) == path
    assert content(read(path)) == content(update)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("broken", ["save_file", "os.replace"])
@pytest.mark.parametrize("existed", [True, False])
def test_a_failed_save_leaves_the_old_file_and_no_partial(
    existed, broken, error, tmp_path, monkeypatch
):
    path = tmp_path / "client.safetensors"
    update = make_update("dense")[2]
    if existed:
        update.save(path)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    seen = []

    def save_half(tensors, name, metadata):
        save_file(tensors, name, metadata)
        os.truncate(name, os.path.getsize(name) // 2)
        seen.append(sorted(os.listdir(tmp_path)))
        raise error

    def fail(source, target):
        seen.append(sorted(os.listdir(tmp_path)))
        raise error

    if broken == "save_file":
        monkeypatch.setattr(update_file, "save_file", save_half)
    else:
        monkeypatch.setattr(update_file.os, "replace", fail)
    with pytest.raises(type(error)):
        make_update("diagonal")[2].save(path)
    assert len(seen[0]) == len(before) + 1  # it did write something, beside the old file
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


# Damage


def test_every_truncation_is_refused(saved, tmp_path):
    data, _ = saved
    path = tmp_path / "short.safetensors"
    header = 8 + struct.unpack("<Q", data[:8])[0]
    lengths = {*range(10), header - 1, header, header + 1, len(data) - 1, len(data) - 4}
    lengths |= set(random.Random(0).sample(range(len(data)), 60))
    for length in sorted(lengths):
        path.write_bytes(data[:length])
        with pytest.raises(UpdateError, match="short"):
            read(path)


@pytest.mark.parametrize("tail", [b"\0", b"\0" * 64, b"PK\x03\x04"], ids=repr)
def test_bytes_after_the_end_are_refused(tail, saved, tmp_path):
    (tmp_path / "long.safetensors").write_bytes(saved[0] + tail)
    refusal(tmp_path / "long.safetensors")


def test_every_flipped_bit_is_refused_or_harmless(saved, tmp_path):
    data, content = saved
    path = tmp_path / "flipped.safetensors"
    payload = 8 + struct.unpack("<Q", data[:8])[0]
    rng = random.Random(0)
    positions = [*range(8), *rng.sample(range(8, payload), 220)]
    positions += rng.sample(range(payload, len(data)), 200)
    refused = 0
    for position in positions:
        flipped = bytearray(data)
        flipped[position] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            update = read(path)
        except UpdateError as error:
            assert str(path) in str(error)  # noqa: PT017
            refused += 1
            continue
        assert position < payload, f"byte {position} of the payload is not covered by a digest"
        assert content(update) == content, f"byte {position} changes what the update says"
    assert refused > 0.95 * len(positions)


def test_exchanged_tensors_are_refused(saved, tmp_path):
    data, _ = saved
    size = struct.unpack("<Q", data[:8])[0]
    head = json.loads(data[8 : 8 + size])
    one, other = head["parameters/norm.weight"], head["parameters/norm.bias"]
    offsets = one["data_offsets"], other["data_offsets"]
    other["data_offsets"], one["data_offsets"] = offsets
    text = json.dumps(head).encode()
    path = tmp_path / "exchanged.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    message = refusal(path)
    assert "parameters/norm.weight" in message
    assert "parameters/norm.bias" in message


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nobody"):
        ClientUpdate.open(tmp_path / "nobody.safetensors")


def test_a_file_that_vanishes_after_opening_is_refused(file):
    opened = ClientUpdate.open(file)
    file.unlink()
    with pytest.raises(UpdateError, match=r"parameters/conv\.weight cannot be read"):
        opened.weights(opened.layers[0])
    with pytest.raises(UpdateError, match="it cannot be read any more"):
        opened.verify()


def test_a_file_nobody_may_read_is_refused(file, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError("not for you")

    monkeypatch.setattr("os.open", forbidden)
    with pytest.raises(UpdateError, match="not for you"):
        ClientUpdate.open(file)


@pytest.mark.parametrize(
    "data",
    [
        b"{}",
        b"not safetensors, but longer than its header",
        b"\xff" * 64,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 90_000_000) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 600_000) + b'{"a":{' * 100_000,
        struct.pack("<Q", 4) + b'"\xff"\x00',
    ],
    ids=lambda data: repr(data[:24]),
)
def test_other_files_are_refused(data, tmp_path):
    path = tmp_path / "other.bin"
    path.write_bytes(data)
    assert "truncated or damaged" in refusal(path)


def test_nothing_is_unpickled(tmp_path):
    victim = tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(victim),)

    path = tmp_path / "client.safetensors"
    torch.save({"parameters/w": torch.ones(2, 3), "run": Payload()}, path)
    refusal(path)
    assert not victim.exists()
    torch.load(io.BytesIO(path.read_bytes()), weights_only=False)
    assert victim.exists()  # the file was armed


# Digests and values


@pytest.mark.parametrize(
    "digests", [{}, {"parameters/v": "0" * 64}, {"parameters/w": "0" * 64}], ids=str
)
def test_missing_and_wrong_digests_are_refused(digests, tmp_path):
    path = tmp_path / "client.safetensors"
    write_raw(path, {ENTRY: sign(matrix_fields(digests=digests))}, MATRIX)
    assert re.search(
        "parameters/w (does not match its|is missing, or has no) digest", refusal(path)
    )


@pytest.mark.parametrize(
    "digests",
    [
        *(None, 5, "ab", [1], [[[], 1]], 10**400, 1e300, True, "", [], {"parameters/w": 1}),
        *([["parameters/w", "0"]], [[1, "x"]], {"parameters/w": None}, {"parameters/w": {"a": []}}),
    ],
    ids=lambda value: str(value)[:20],
)
def test_malformed_digests_are_refused(digests, tmp_path):
    path = tmp_path / "client.safetensors"
    write_raw(path, {ENTRY: sign(matrix_fields(digests=digests))}, MATRIX)
    assert "its header is missing or malformed" in refusal(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_all_named(value, file):
    names = ["parameters/conv.weight", "curvature/norm/values", "buffers/norm.running_var"]

    def spoil(fields, tensors):
        for count, name in enumerate(names, start=1):
            tensors[name].view(-1)[:count] = value

    forge(file, spoil)
    ClientUpdate.open(file)  # reads no tensor
    with pytest.raises(UpdateError) as caught:
        read(file)
    assert set(caught.value.offenders) == {
        f"{name} holds {count} values that are not finite"
        for count, name in enumerate(names, start=1)
    }


# The client's side


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_from_model_names_everything_that_is_not_finite(value):
    model, blocks, update = make_update("diagonal")
    with torch.no_grad():
        model.conv.weight.view(-1)[:2] = value
        model.norm.running_var[0] = value
        blocks["größe/头"].values[1, 1] = value
    with pytest.raises(UpdateError, match="this update is not a usable") as caught:
        ClientUpdate.from_model(model, update.header, blocks)
    assert set(caught.value.offenders) == {
        "parameters/conv.weight holds 2 values that are not finite",
        "buffers/norm.running_var holds 1 values that are not finite",
        "curvature/größe/头/values holds 1 values that are not finite",
    }


@pytest.mark.parametrize("num_samples", [0, -3])
def test_from_model_refuses_an_empty_client(num_samples):
    model, blocks, update = make_update("dense")
    header = replace(update.header, num_samples=num_samples)
    with pytest.raises(UpdateError, match=f"num_samples is {num_samples}"):
        ClientUpdate.from_model(model, header, blocks)


def test_from_model_refuses_blocks_of_other_layers():
    model, blocks, update = make_update("diagonal")
    missing = {name: block for name, block in blocks.items() if name != "norm"}
    with pytest.raises(UpdateError, match="curvature/norm/values should be"):
        ClientUpdate.from_model(model, update.header, missing)
    wrong = {**blocks, "norm": Diagonal(torch.ones(2, 2))}
    with pytest.raises(UpdateError, match=r"curvature/norm/values should be \(3, 2\)"):
        ClientUpdate.from_model(model, update.header, wrong)


@pytest.mark.parametrize("group", ["parameters/w", "buffers/b"])
def test_complex_nan_is_refused(group, tmp_path):
    array = {group: ("C64", [2, 3], struct.pack("<f", float("nan")) * 12)}
    digest = {group: reference_digest(torch.complex64, *array[group][1:])}
    fields = matrix_fields()
    fields["digests"] |= digest
    path = tmp_path / "client.safetensors"
    write_raw(path, {ENTRY: sign(fields)}, MATRIX | array)
    assert group in refusal(path)


@pytest.mark.parametrize(("dtype", "name"), [("I32", torch.int32), ("U32", torch.uint32)])
def test_weights_that_are_no_numbers_with_a_point_are_refused(dtype, name, tmp_path):
    array = {"parameters/w": (dtype, [2, 3], bytes(24))}
    digests = {"parameters/w": reference_digest(name, [2, 3], bytes(24))}
    path = tmp_path / "client.safetensors"
    write_raw(path, {ENTRY: sign(matrix_fields(digests=digests))}, array)
    assert "parameters/w" in refusal(path)


@pytest.mark.parametrize(
    ("shape", "data"),
    [([0, 2**63], b""), ([0, 2**40, 2**40], b""), ([1] * 70, bytes(4))],
    ids=["size overflows", "strides overflow", "70 dimensions"],
)
def test_buffers_torch_cannot_hold_are_refused(shape, data, tmp_path):
    fields = matrix_fields()
    fields["digests"]["buffers/b"] = reference_digest(torch.float32, shape, data)
    path = tmp_path / "client.safetensors"
    write_raw(path, {ENTRY: sign(fields)}, MATRIX | {"buffers/b": ("F32", shape, data)})
    assert "buffers/b" in refusal(path)
