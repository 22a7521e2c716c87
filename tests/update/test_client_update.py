"""ClientUpdate and its file: bitwise round trips, lazy reads, and refusal of everything damaged."""

import hashlib
import io
import json
import os
import random
import re
import struct
from dataclasses import asdict, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher import ClientUpdate, UpdateError
from lightning_fedfisher.curvature.base import Identity
from lightning_fedfisher.curvature.diagonal import Diagonal
from lightning_fedfisher.extraction.extract import extract_curvature
from lightning_fedfisher.layers import Source, find_layers
from lightning_fedfisher.update import file_format as update_file
from lightning_fedfisher.update.consistency import inconsistencies
from lightning_fedfisher.update.header import UpdateHeader

KINDS = ("identity", "diagonal", "kfac", "dense")
METADATA = {"город": "Ærøskøbing", "emoji": "🐟", "empty": "", "quoted": 'a "b"\\\n\t\x00'}
ENTRY = "lightning_fedfisher"  # of the safetensors metadata
MATRIX = {"parameters/w": ("F32", [2, 3], struct.pack("<6f", *range(6)))}


class _Normed(nn.Module):
    """Counters and statistics as buffers, a constant that is not sent, names beyond ASCII."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.add_module("größe/头", nn.Linear(3 * 16, 4))
        self.register_buffer("constant", torch.arange(5.0), persistent=False)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().flatten(1)
        return getattr(self, "größe/头")(x)


class _Odd(nn.Module):
    """Parameters that are no matrices, for the identity, which runs no forward pass."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.tokens = nn.Parameter(torch.randn(2, 3, 4))
        self.embedding = nn.Embedding(5, 3)
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("mask", torch.tensor([True, False]))


def _model(kind):
    torch.manual_seed(0)
    if kind == "identity":
        return _Odd()
    if kind == "diagonal":
        model = _Normed()
        model(torch.randn(8, 1, 6, 6))  # moves the running statistics
        return model
    if kind == "kfac":
        return nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4, bias=False)
        )
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 3, bias=False), nn.Tanh(), nn.Linear(3, 4))


def _header(kind, layers, blocks, **changes):
    header = UpdateHeader(
        num_samples=12,
        curvature=kind,
        fisher="" if kind == "identity" else "normalised",
        likelihood="categorical",
        curvature_samples=0 if kind == "identity" else 12,
        layers=tuple(layers),
        kinds={name: block.kind for name, block in blocks.items()},
        metadata=METADATA,
    )
    return replace(header, **changes)


def _update(kind="diagonal", dtype=torch.float32, model=None):
    """A model, its curvature and the update of both."""
    model = (_model(kind) if model is None else model).to(dtype)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = -0.0  # equal to zero, of other bits
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(12, 1, 6, 6), torch.arange(12) % 4)
    extracted = extract_curvature(model, DataLoader(data, batch_size=5), kind, progress=False)
    header = _header(kind, extracted.layers, extracted.blocks)
    return model, extracted.blocks, ClientUpdate.from_model(model, header, extracted.blocks)


def _bits(tensor):
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), data.numpy().tobytes()


def _content(update):
    """Everything an update says, in a form that compares bit by bit."""
    groups = {"parameters": update.parameters, "buffers": update.buffers}
    groups |= {f"block {name}": block.tensors() for name, block in update.blocks.items()}
    tensors = {group: {n: _bits(t) for n, t in part.items()} for group, part in groups.items()}
    return asdict(update.header), tensors


def _read(path):
    """What a server does with a file before it trusts it."""
    update = ClientUpdate.open(path)
    update.verify()
    return update


def _reference_digest(dtype, shape, data):
    return hashlib.sha256(f"{dtype} {tuple(shape)}".encode() + data).hexdigest()


def _sign(fields):
    """The envelope of a header, as a client that lies well would write it."""
    text = fields if isinstance(fields, str) else json.dumps(fields)
    return json.dumps({"digest": hashlib.sha256(text.encode()).hexdigest(), "header": text})


def _fields(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(json.loads(file.metadata()[ENTRY])["header"])


def _forge(path, change):
    """Changes header fields and tensors of a file, with every digest in order."""
    fields, tensors = _fields(path), load_file(path)
    change(fields, tensors)
    digests = {name: _reference_digest(*_bits(tensor)) for name, tensor in tensors.items()}
    fields.setdefault("digests", {}).update(digests)
    path.unlink()
    save_file(tensors, path, {ENTRY: _sign(fields)})


def _raw(path, metadata, arrays):
    """Writes safetensors by hand, which refuses nothing."""
    head, body = ({} if metadata is None else {"__metadata__": metadata}), b""
    for name, (dtype, shape, data) in arrays.items():
        offsets = [len(body), len(body) + len(data)]
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        body += data
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def _matrix_fields(**changes):
    """Header of `MATRIX`: one layer of one parameter ``w``."""
    digest = _reference_digest(torch.float32, *MATRIX["parameters/w"][1:])
    fields = {
        "schema": 1,
        "quantized": {},
        "num_samples": 3,
        "curvature": "identity",
        "fisher": "",
        "likelihood": "categorical",
        "curvature_samples": 0,
        "layers": [{"name": "w", "parameters": [["w", [2, 3]]]}],
        "kinds": {"w": "identity"},
        "metadata": {},
        "aliases": {},
        "frozen": {},
        "fed_by": {},
        "output_layer": "",
        "digests": {"parameters/w": digest},
    }
    return fields | changes


def _refusal(path):
    """The message with which a file is refused; it names the file."""
    with pytest.raises(UpdateError) as caught:
        _read(path)
    assert str(path) in str(caught.value)
    assert caught.value.offenders
    return str(caught.value)


@pytest.fixture
def file(tmp_path):
    return _update()[2].save(tmp_path / "client.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Bytes and content of a file with every group of tensors."""
    path = tmp_path_factory.mktemp("saved") / "client.safetensors"
    _update()[2].save(path)
    return path.read_bytes(), _content(_read(path))


# Round trip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_bitwise(kind, dtype, tmp_path):
    model, blocks, update = _update(kind, dtype)
    opened = ClientUpdate.open(update.save(tmp_path / "client.safetensors"))
    opened.verify()

    parameters = {name: _bits(tensor) for name, tensor in model.named_parameters()}
    state = {name: _bits(tensor) for name, tensor in model.state_dict().items()}
    for one in (update, opened):
        assert {name: _bits(tensor) for name, tensor in one.parameters.items()} == parameters
        sent = {name: _bits(t) for name, t in (one.parameters | one.buffers).items()}
        assert sent == state
        assert one.blocks.keys() == blocks.keys()
        for name, block in blocks.items():
            assert type(one.blocks[name]) is type(block)
            assert one.blocks[name].shape == block.shape
            assert {n: _bits(t) for n, t in one.blocks[name].tensors().items()} == {
                n: _bits(t) for n, t in block.tensors().items()
            }
    assert opened.header == update.header
    assert opened.header.metadata == METADATA
    assert opened.layers == find_layers(model)
    assert opened.num_samples == 12
    assert opened.source == str(tmp_path / "client.safetensors")


def test_batch_norm_counters_travel_and_non_persistent_buffers_stay():
    model, _, update = _update("diagonal")
    assert set(update.buffers) == {
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    assert update.buffers["norm.num_batches_tracked"].dtype == torch.int64
    assert update.buffers["norm.num_batches_tracked"] == 1
    assert "constant" in dict(model.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_weights_are_the_layer_as_one_matrix(dtype, tmp_path):
    model, _, update = _update("diagonal", dtype)
    opened = ClientUpdate.open(update.save(tmp_path / "client.safetensors"))
    conv, norm, head = opened.layers
    expected = {
        conv: [model.conv.weight.reshape(3, 9), model.conv.bias[:, None]],
        norm: [model.norm.weight[:, None], model.norm.bias[:, None]],
        head: [getattr(model, "größe/头").weight, getattr(model, "größe/头").bias[:, None]],
    }
    for layer, columns in expected.items():
        assert _bits(opened.weights(layer)) == _bits(torch.cat(columns, dim=1))
        assert opened.block(layer).shape == layer.shape


def test_fedavg_bytes_count_weights_and_buffers_only(tmp_path):
    model, _, update = _update("diagonal", torch.bfloat16)
    weights = sum(parameter.numel() for parameter in model.parameters())
    expected = 2 * weights + 2 * (3 + 3) + 8  # running statistics in bfloat16, one int64
    assert update.fedavg_bytes == expected
    assert ClientUpdate.open(update.save(tmp_path / "u")).fedavg_bytes == expected


@pytest.mark.parametrize("kind", KINDS)
def test_same_update_same_bytes(kind, tmp_path):
    first = _update(kind)[2].save(tmp_path / "first").read_bytes()
    again = _update(kind)[2]
    assert again.save(tmp_path / "again").read_bytes() == first
    assert again.save(tmp_path / "again").read_bytes() == first
    assert _read(tmp_path / "first").save(tmp_path / "copy").read_bytes() == first


def test_an_opened_update_can_be_saved_over_its_own_file(file):
    before = file.read_bytes()
    opened = ClientUpdate.open(file)
    opened.save(file)
    assert file.read_bytes() == before
    opened.verify()


def test_update_does_not_alias_the_model_or_its_curvature():
    model, blocks, update = _update("diagonal")
    before = _content(update)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.add_(1)
        for block in blocks.values():
            block.values.add_(1)
    assert _content(update) == before


def test_tensors_read_from_a_file_are_private(file):
    opened = ClientUpdate.open(file)
    before = file.read_bytes()
    layer = opened.layers[0]
    opened.parameters["conv.weight"].fill_(7)
    opened.block(layer).values.fill_(7)
    assert file.read_bytes() == before
    opened.verify()


def test_strided_and_shared_memory_is_sent_as_values(tmp_path):
    linear = nn.Linear(4, 3, bias=False)
    linear.weight = nn.Parameter(torch.arange(12.0).reshape(4, 3).T)
    linear.register_buffer("expanded", torch.ones(1, 3).expand(2, 3))
    linear.register_buffer("view", linear.weight.detach()[:2])
    shared = torch.arange(12.0).reshape(3, 4)
    layers = find_layers(linear)
    blocks = {layers[0].name: Diagonal(shared)}
    linear.register_buffer("shared", shared)
    update = ClientUpdate.from_model(linear, _header("diagonal", layers, blocks), blocks)
    opened = _read(update.save(tmp_path / "client.safetensors"))
    assert torch.equal(opened.parameters["weight"], linear.weight)
    assert torch.equal(opened.buffers["expanded"], torch.ones(2, 3))
    assert torch.equal(opened.buffers["view"], linear.weight[:2])
    assert torch.equal(opened.block(layers[0]).values, shared)


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
    assert len(_refusal(file).splitlines()) == 2  # one offender


# Saving


def test_missing_folders_are_made_and_the_path_returned(tmp_path):
    update = _update("dense")[2]
    path = tmp_path / "a" / "b" / "client.safetensors"
    assert update.save(str(path)) == path
    assert _content(_read(path)) == _content(update)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("broken", ["save_file", "os.replace"])
@pytest.mark.parametrize("existed", [True, False])
def test_a_failed_save_leaves_the_old_file_and_no_partial(
    existed, broken, error, tmp_path, monkeypatch
):
    path = tmp_path / "client.safetensors"
    update = _update("dense")[2]
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
        _update("diagonal")[2].save(path)
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
            _read(path)


@pytest.mark.parametrize("tail", [b"\0", b"\0" * 64, b"PK\x03\x04"], ids=repr)
def test_bytes_after_the_end_are_refused(tail, saved, tmp_path):
    (tmp_path / "long.safetensors").write_bytes(saved[0] + tail)
    _refusal(tmp_path / "long.safetensors")


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
            update = _read(path)
        except UpdateError as error:
            assert str(path) in str(error)  # noqa: PT017
            refused += 1
            continue
        assert position < payload, f"byte {position} of the payload is not covered by a digest"
        assert _content(update) == content, f"byte {position} changes what the update says"
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
    message = _refusal(path)
    assert "parameters/norm.weight" in message
    assert "parameters/norm.bias" in message


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nobody"):
        ClientUpdate.open(tmp_path / "nobody.safetensors")
    with pytest.raises(FileNotFoundError):
        ClientUpdate.open(tmp_path)


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

    monkeypatch.setattr("pathlib.Path.open", forbidden)
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
    assert "truncated or damaged" in _refusal(path)


def test_nothing_is_unpickled(tmp_path):
    victim = tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(victim),)

    path = tmp_path / "client.safetensors"
    torch.save({"parameters/w": torch.ones(2, 3), "run": Payload()}, path)
    _refusal(path)
    assert not victim.exists()
    torch.load(io.BytesIO(path.read_bytes()), weights_only=False)
    assert victim.exists()  # the file was armed


# A header that lies


def _set(name, value):
    def change(fields, tensors):
        fields[name] = value

    return change


def _drop(tensor):
    return lambda fields, tensors: tensors.pop(tensor)


def _put(tensor, value):
    return lambda fields, tensors: tensors.update({tensor: value})


def _kind(value):
    return lambda fields, tensors: fields["kinds"].update({"norm": value})


def _cover_twice(fields, tensors):
    norm = next(layer for layer in fields["layers"] if layer["name"] == "norm")
    fields["layers"].append({"name": "again", "parameters": norm["parameters"][:1]})
    fields["kinds"]["again"] = "identity"


def _cover_twice_in_one_layer(fields, tensors):
    norm = next(layer for layer in fields["layers"] if layer["name"] == "norm")
    norm["parameters"].append(norm["parameters"][0])


def _resize(shape):
    def change(fields, tensors):
        norm = next(layer for layer in fields["layers"] if layer["name"] == "norm")
        norm["parameters"][0][1] = shape

    return change


def _reads(reader, layer, activation="relu"):
    return _set("fed_by", {reader: {"layer": layer, "activation": activation}})


LIES = {
    "parameter missing": (_drop("parameters/conv.bias"), "parameters/conv.bias"),
    "curvature missing": (_drop("curvature/norm/values"), "curvature/norm/values"),
    "parameter extra": (_put("parameters/more", torch.ones(2)), "parameters/more"),
    "curvature extra": (_put("curvature/norm/more", torch.ones(2)), "curvature/norm/more"),
    "group extra": (_put("more", torch.ones(2)), "more"),
    "parameter shape": (_put("parameters/conv.bias", torch.ones(4)), "parameters/conv.bias"),
    "parameter transposed": (
        _put("parameters/conv.weight", torch.ones(1, 3, 3, 3)),
        "parameters/conv.weight",
    ),
    "curvature shape": (_put("curvature/norm/values", torch.ones(2, 3)), "curvature/norm/values"),
    "kind unknown": (_kind("kfac2"), "layer norm: unknown curvature kfac2"),
    "kind of another block": (_kind("kronecker"), "curvature/norm/row_factor"),
    "kind is a class path": (_kind("builtins.eval"), "layer norm"),
    "no kinds": (_set("kinds", {}), "layer norm"),
    "parameter in two layers": (_cover_twice, "parameter norm.weight belongs to two layers"),
    "parameter twice in a layer": (_cover_twice_in_one_layer, "belongs to two layers"),
    "no layers": (_set("layers", []), "parameters/conv.weight"),
    "layer of nothing": (_set("layers", [{"name": "norm", "parameters": []}]), "layer norm"),
    "size 0": (_resize([0]), "layer norm"),
    "size negative": (_resize([-3]), "layer norm"),
    "size huge": (_resize([2**40, 2**40]), "layer norm"),
    "size huge, one row": (_resize([1, 2**62]), "parameters/norm.weight"),
    "size float": (_resize([3.0]), "expected int, got 3.0"),
    "size bool": (_resize([True]), "expected int, got True"),
    "size string": (_resize("3"), "expected int, got '3'"),
    "num_samples 0": (_set("num_samples", 0), "num_samples is 0"),
    "num_samples negative": (_set("num_samples", -5), "num_samples is -5"),
    "num_samples bool": (_set("num_samples", True), "got True"),
    "num_samples float": (_set("num_samples", 12.0), "got 12.0"),
    "num_samples string": (_set("num_samples", "12"), "got '12'"),
    "num_samples nan": (_set("num_samples", float("nan")), "got nan"),
    "num_samples null": (_set("num_samples", None), "got None"),
    "curvature_samples negative": (_set("curvature_samples", -1), "curvature_samples is -1"),
    "curvature_samples bool": (_set("curvature_samples", False), "got False"),
    "fisher list": (_set("fisher", ["exact"]), "got ['exact']"),
    "metadata number": (_set("metadata", {"epochs": 3}), "expected str, got 3"),
    "metadata list": (_set("metadata", [["a", "b"]]), "header is missing or malformed"),
    "alias of nothing": (_set("aliases", {"v": "nothing"}), "v cannot be another name of nothing"),
    "alias is a parameter": (
        _set("aliases", {"norm.weight": "norm.weight"}),
        "norm.weight cannot be another name",
    ),
    "frozen and trained": (_set("frozen", {"norm.weight": "0"}), "norm.weight is frozen and"),
    "frozen at a number": (_set("frozen", {"v": 0}), "expected str, got 0"),
    "source is no layer": (_reads("norm", "more"), "layer norm cannot read more: one of them is"),
    "reader is no layer": (_reads("more", "norm"), "layer more cannot read norm: one of them is"),
    "source of a bias": (_reads("norm", "conv.bias"), "layer norm cannot read conv.bias"),
    "activation unknown": (_reads("conv", "norm", "gelu"), "layer conv: unknown activation gelu"),
    "activation empty": (_reads("conv", "norm", ""), "layer conv: unknown activation"),
    "activation null": (_reads("conv", "norm", None), "expected str, got None"),
    "activation list": (_reads("conv", "norm", ["relu"]), "expected str, got ['relu']"),
    "source number": (_reads("conv", 3), "expected str, got 3"),
    "more units than inputs": (_reads("norm", "conv"), "norm cannot read conv: its inputs do not"),
    "no whole block": (_reads("conv", "größe/头"), "conv cannot read größe/头: its inputs do not"),
    "reads itself": (_reads("conv", "conv"), "layer conv reads its own outputs"),
    "source of two fields": (_set("fed_by", {"conv": ["norm", "relu"]}), "missing or malformed"),
    "source without activation": (_set("fed_by", {"conv": {"layer": "norm"}}), "malformed"),
    "source with more": (
        _set("fed_by", {"conv": {"layer": "norm", "activation": "relu", "gain": 2}}),
        "missing or malformed",
    ),
    "sources list": (_set("fed_by", []), "header is missing or malformed"),
    "head is no layer": (
        _set("output_layer", "conv.weight"),
        "the output layer conv.weight is no layer",
    ),
    "head null": (_set("output_layer", None), "expected str, got None"),
    "schema 2": (_set("schema", 2), "its schema is 2, this version reads 1"),
    "schema string": (_set("schema", "1"), "its schema is '1'"),
    "field unknown": (_set("unknown", 1), "unknown"),
    "deep value": (_set("num_samples", json.loads("[" * 900 + "]" * 900)), "expected int"),
}


@pytest.mark.parametrize(("change", "reason"), LIES.values(), ids=LIES)
def test_a_header_that_contradicts_the_tensors_is_refused(change, reason, file):
    _forge(file, change)
    assert reason in _refusal(file)


def test_a_source_that_divides_is_not_what_is_refused(file):
    _forge(file, _reads("größe/头", "conv"))
    assert _read(file).header.fed_by == {"größe/头": Source("conv", "relu")}


def _in_line(layers=4, **changes):
    """A header of square layers, and shapes to match."""
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(layers)))
    found = find_layers(model)
    blocks = {layer.name: Identity(layer.shape) for layer in found}
    header = _header("identity", found, blocks, **changes)
    return header, {f"parameters/{name}": tuple(p.shape) for name, p in model.named_parameters()}


def test_a_chain_of_sources_is_consistent():
    sources = {str(n): Source(str(n - 1), "identity") for n in (3, 1, 2)}
    assert inconsistencies(*_in_line(fed_by=sources, output_layer="3")) == []


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_layers_that_read_each_other_in_a_circle_are_refused(length):
    ring = {str(n): Source(str((n + 1) % length), "relu") for n in range(length)}
    (offender,) = inconsistencies(*_in_line(fed_by=ring))
    assert re.fullmatch(r"layer \d reads its own outputs", offender)


def test_all_that_misleads_is_named_at_once(file):
    def change(fields, tensors):
        fields["output_layer"] = "nothing"
        fields["fed_by"] = {
            "conv": {"layer": "conv", "activation": "relu"},
            "norm": {"layer": "conv", "activation": "relu"},
            "größe/头": {"layer": "conv", "activation": "tanh"},
            "more": {"layer": "conv", "activation": "relu"},
        }

    _forge(file, change)
    message = _refusal(file)
    for reason in (
        "the output layer nothing is no layer",
        "layer conv reads its own outputs",
        "layer norm cannot read conv: its inputs do not divide",
        "layer größe/头: unknown activation tanh",
        "layer more cannot read conv: one of them is no layer",
    ):
        assert reason in message


def test_forging_itself_is_not_what_is_refused(file, saved):
    _forge(file, lambda fields, tensors: None)
    assert _content(_read(file)) == saved[1]


@pytest.mark.parametrize("name", [*asdict(_header("identity", (), {})), "schema", "digests"])
def test_every_header_field_is_needed(name, tmp_path):
    path = tmp_path / "client.safetensors"
    fields = _matrix_fields()
    _raw(path, {ENTRY: _sign(fields)}, MATRIX)
    assert _read(path).parameters["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    del fields[name]
    _raw(path, {ENTRY: _sign(fields)}, MATRIX)
    assert name in _refusal(path)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {},
        {"format": "pt"},
        *(
            {ENTRY: text}
            for text in (
                "",
                "null",
                "3",
                "[]",
                '"text"',
                "{}",
                '{"header": "{}"}',
                '{"header": {}, "digest": ""}',
                '{"header": "\\ud800", "digest": ""}',
                _sign("{}").replace('"digest": "', '"digest": "0'),
                _sign("[]"),
                _sign("null"),
                _sign("{"),
                _sign("9" * 5000),
                "[" * 100_000,
                '{"a":' * 100_000,
                _sign("[" * 100_000),
                _sign('{"schema":' * 100_000),
            )
        ),
    ],
    ids=lambda metadata: str(metadata)[:60],
)
def test_missing_or_malformed_headers_are_refused(metadata, tmp_path):
    path = tmp_path / "client.safetensors"
    _raw(path, metadata, MATRIX)
    assert "its header is missing or malformed" in _refusal(path)


@pytest.mark.parametrize(
    "digests", [{}, {"parameters/w": None}, {"parameters/w": "0" * 64}], ids=str
)
def test_missing_and_wrong_digests_are_refused(digests, tmp_path):
    path = tmp_path / "client.safetensors"
    _raw(path, {ENTRY: _sign(_matrix_fields(digests=digests))}, MATRIX)
    assert re.search(
        "parameters/w (does not match its|is missing, or has no) digest", _refusal(path)
    )


@pytest.mark.parametrize("digests", [None, 5, "ab", [1], [[[], 1]]], ids=str)
def test_malformed_digests_are_refused(digests, tmp_path):
    path = tmp_path / "client.safetensors"
    _raw(path, {ENTRY: _sign(_matrix_fields(digests=digests))}, MATRIX)
    assert "its header is missing or malformed" in _refusal(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_all_named(value, file):
    names = ["parameters/conv.weight", "curvature/norm/values", "buffers/norm.running_var"]

    def spoil(fields, tensors):
        for count, name in enumerate(names, start=1):
            tensors[name].view(-1)[:count] = value

    _forge(file, spoil)
    ClientUpdate.open(file)  # reads no tensor
    with pytest.raises(UpdateError) as caught:
        _read(file)
    assert set(caught.value.offenders) == {
        f"{name} holds {count} values that are not finite"
        for count, name in enumerate(names, start=1)
    }


# The client's side


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_from_model_names_everything_that_is_not_finite(value):
    model, blocks, update = _update("diagonal")
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
    model, blocks, update = _update("dense")
    header = replace(update.header, num_samples=num_samples)
    with pytest.raises(UpdateError, match=f"num_samples is {num_samples}"):
        ClientUpdate.from_model(model, header, blocks)


def test_from_model_refuses_blocks_of_other_layers():
    model, blocks, update = _update("diagonal")
    missing = {name: block for name, block in blocks.items() if name != "norm"}
    with pytest.raises(UpdateError, match="curvature/norm/values should be"):
        ClientUpdate.from_model(model, update.header, missing)
    wrong = {**blocks, "norm": Diagonal(torch.ones(2, 2))}
    with pytest.raises(UpdateError, match=r"curvature/norm/values should be \(3, 2\)"):
        ClientUpdate.from_model(model, update.header, wrong)


def _double_name(fields, tensors):
    fields["layers"] = [{"name": "x", "parameters": [[name, [3]]]} for name in ("a", "b")]
    fields["kinds"] = {"x": "diagonal"}
    tensors.clear()
    tensors["parameters/a"], tensors["parameters/b"] = torch.ones(3), torch.ones(3)
    tensors["curvature/x/values"] = torch.ones(3, 1)
    fields["digests"] = {}


def test_duplicate_layer_names_are_refused(file):
    _forge(file, _double_name)
    assert "x" in _refusal(file)


def test_a_missing_buffer_is_refused(file):
    _forge(file, _drop("buffers/norm.running_var"))
    assert "buffers/norm.running_var" in _refusal(file)


@pytest.mark.parametrize("schema", [True, 0, 1.0, 2])
def test_schema_is_exactly_a_number(schema, file):
    _forge(file, _set("schema", schema))
    assert "schema" in _refusal(file)


@pytest.mark.parametrize("group", ["parameters/w", "buffers/b"])
def test_complex_nan_is_refused(group, tmp_path):
    array = {group: ("C64", [2, 3], struct.pack("<f", float("nan")) * 12)}
    digest = {group: _reference_digest(torch.complex64, *array[group][1:])}
    fields = _matrix_fields()
    fields["digests"] |= digest
    path = tmp_path / "client.safetensors"
    _raw(path, {ENTRY: _sign(fields)}, MATRIX | array)
    assert group in _refusal(path)


@pytest.mark.parametrize(("dtype", "name"), [("I32", torch.int32), ("U32", torch.uint32)])
def test_weights_that_are_no_numbers_with_a_point_are_refused(dtype, name, tmp_path):
    array = {"parameters/w": (dtype, [2, 3], bytes(24))}
    digests = {"parameters/w": _reference_digest(name, [2, 3], bytes(24))}
    path = tmp_path / "client.safetensors"
    _raw(path, {ENTRY: _sign(_matrix_fields(digests=digests))}, array)
    assert "parameters/w" in _refusal(path)


@pytest.mark.parametrize(
    ("shape", "data"),
    [([0, 2**63], b""), ([0, 2**40, 2**40], b""), ([1] * 70, bytes(4))],
    ids=["size overflows", "strides overflow", "70 dimensions"],
)
def test_buffers_torch_cannot_hold_are_refused(shape, data, tmp_path):
    fields = _matrix_fields()
    fields["digests"]["buffers/b"] = _reference_digest(torch.float32, shape, data)
    path = tmp_path / "client.safetensors"
    _raw(path, {ENTRY: _sign(fields)}, MATRIX | {"buffers/b": ("F32", shape, data)})
    assert "buffers/b" in _refusal(path)


@pytest.mark.parametrize("kind", ["diagonal", "kronecker", "dense"])
def test_sizes_too_long_to_print_are_refused(kind, tmp_path):
    shape = [1, 10**4000, 10**4000]
    fields = _matrix_fields(layers=[{"name": "w", "parameters": [["w", shape]]}])
    fields["kinds"] = {"w": kind}
    path = tmp_path / "client.safetensors"
    _raw(path, {ENTRY: _sign(fields)}, MATRIX)
    assert "w" in _refusal(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_samples": True},
        {"num_samples": 12.0},
        {"num_samples": "12"},
        {"curvature_samples": 1.5},
        {"fisher": None},
        {"metadata": {"epochs": 3}},
        {"output_layer": None},
        {"fed_by": {0: Source("", "relu")}},
        {"fed_by": {"": Source(1, "relu")}},
        {"fed_by": {"": Source("", None)}},
    ],
    ids=str,
)
def test_a_client_cannot_write_what_no_server_reads(changes, tmp_path):
    linear = nn.Linear(3, 2)
    layers = find_layers(linear)
    blocks = {layer.name: Identity(layer.shape) for layer in layers}
    with pytest.raises(TypeError, match="expected"):
        _header("identity", layers, blocks, **changes)
