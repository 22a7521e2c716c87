"""Update files, sound and forged: a header may say anything with every digest in order."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher import ClientUpdate, UpdateError
from lightning_fedfisher.extraction.extract import extract_curvature
from lightning_fedfisher.update.header import UpdateHeader

METADATA = {"город": "Ærøskøbing", "emoji": "🐟", "empty": "", "quoted": 'a "b"\\\n\t\x00'}
ENTRY = "lightning_fedfisher"  # of the safetensors metadata
MATRIX = {"parameters/w": ("F32", [2, 3], struct.pack("<6f", *range(6)))}


class Normed(nn.Module):
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
        model = Normed()
        model(torch.randn(8, 1, 6, 6))  # moves the running statistics
        return model
    if kind == "kfac":
        return nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4, bias=False)
        )
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 3, bias=False), nn.Tanh(), nn.Linear(3, 4))


def make_header(kind, layers, blocks, **changes):
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


def make_update(kind="diagonal", dtype=torch.float32, model=None):
    """A model, its curvature and the update of both."""
    model = (_model(kind) if model is None else model).to(dtype)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = -0.0  # equal to zero, of other bits
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(12, 1, 6, 6), torch.arange(12) % 4)
    extracted = extract_curvature(model, DataLoader(data, batch_size=5), kind, progress=False)
    header = make_header(kind, extracted.layers, extracted.blocks)
    return model, extracted.blocks, ClientUpdate.from_model(model, header, extracted.blocks)


def bits(tensor):
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), data.numpy().tobytes()


def content(update):
    """Everything an update says, in a form that compares bit by bit."""
    groups = {"parameters": update.parameters, "buffers": update.buffers}
    groups |= {f"block {name}": block.tensors() for name, block in update.blocks.items()}
    tensors = {group: {n: bits(t) for n, t in part.items()} for group, part in groups.items()}
    return asdict(update.header), tensors


def read(path):
    """What a server does with a file before it trusts it."""
    update = ClientUpdate.open(path)
    update.verify()
    return update


def reference_digest(dtype, shape, data):
    return hashlib.sha256(f"{dtype} {tuple(shape)}".encode() + data).hexdigest()


def sign(fields):
    """The envelope of a header, as a client that lies well would write it."""
    text = fields if isinstance(fields, str) else json.dumps(fields)
    return json.dumps({"digest": hashlib.sha256(text.encode()).hexdigest(), "header": text})


def _fields(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(json.loads(file.metadata()[ENTRY])["header"])


def forge(path, change):
    """Changes header fields and tensors of a file, with every digest in order."""
    fields, tensors = _fields(path), load_file(path)
    change(fields, tensors)
    digests = {name: reference_digest(*bits(tensor)) for name, tensor in tensors.items()}
    fields.setdefault("digests", {}).update(digests)
    path.unlink()
    save_file(tensors, path, {ENTRY: sign(fields)})


def write_raw(path, metadata, arrays):
    """Writes safetensors by hand, which refuses nothing."""
    head, body = ({} if metadata is None else {"__metadata__": metadata}), b""
    for name, (dtype, shape, data) in arrays.items():
        offsets = [len(body), len(body) + len(data)]
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        body += data
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def matrix_fields(**changes):
    """Header of `MATRIX`: one layer of one parameter ``w``."""
    digest = reference_digest(torch.float32, *MATRIX["parameters/w"][1:])
    fields = {
        "schema": 2,
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


def refusal(path):
    """The message with which a file is refused; it names the file."""
    with pytest.raises(UpdateError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert caught.value.offenders
    return str(caught.value)


# Changes for `forge`


def set_field(name, value):
    def change(fields, tensors):
        fields[name] = value

    return change


def drop_tensor(tensor):
    return lambda fields, tensors: tensors.pop(tensor)


def put_tensor(tensor, value):
    return lambda fields, tensors: tensors.update({tensor: value})


def resize(shape):
    """Changes the shape that the header gives the first parameter of the layer ``norm``."""

    def change(fields, tensors):
        norm = next(layer for layer in fields["layers"] if layer["name"] == "norm")
        norm["parameters"][0][1] = shape

    return change


def feed(reader, layer, activation="relu"):
    """Says that a layer reads the outputs of another one, and of no other."""
    return set_field("fed_by", {reader: {"layer": layer, "activation": activation}})
