"""Makes update files as a stranger might send them: damaged, cut, or forged and signed anew."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

_KEY = "lightning_fedfisher"
_VALUES: tuple[Any, ...] = (
    *(0, -1, 1, 2, 1.5, 10**9, 10**18, 2**31, 2**63, 10**400, 1e300, -1e300, 5e-324),
    *(True, None, "x", "\x1b[2J", "\ud800", "float16", "kronecker", [], {}, [1e9], [[[]]]),
    *(float("nan"), float("inf")),
)
_ENDS = (
    *(0.0, 1.0, -1.0, 5e-324, 1e-45, 1e-38, 1e-30, 1e-9, 1e6, 0.99e9, 1e12, 0.99e18, 1.01e18),
    *(1e30, 3.4028234663852886e38, -3.4028234663852886e38, float("inf"), float("nan")),
)
_TYPES = {"U8": "torch.uint8", "F32": "torch.float32", "F64": "torch.float64", "I64": "torch.int64"}


@dataclass
class UpdateParts:
    """The parts of an update file.

    Attributes:
        index: type, shape and place of each tensor, by name.
        fields: the update's own header.
        content: the bytes of all tensors.
    """

    index: dict[str, Any]
    fields: Any
    content: bytearray

    @classmethod
    def read(cls, data: bytes) -> UpdateParts:
        """Takes an honest file apart.

        Args:
            data: all bytes of the file.

        Returns:
            Its parts.
        """
        (size,) = struct.unpack("<Q", data[:8])
        index = json.loads(data[8 : 8 + size])
        envelope = json.loads(index.pop("__metadata__")[_KEY])
        return cls(index, json.loads(envelope["header"]), bytearray(data[8 + size :]))

    def signed(self) -> bytes:
        """Puts a file together again, with right digests whatever it holds."""
        if isinstance(self.fields, dict) and isinstance(self.fields.get("digests"), dict):
            for name in self.fields["digests"].keys() & self.index.keys():
                self.fields["digests"][name] = self._digest(self.index[name])
        text = json.dumps(self.fields, sort_keys=True)
        own = hashlib.sha256(text.encode()).hexdigest()
        metadata = {_KEY: json.dumps({"digest": own, "header": text})}
        header = json.dumps({"__metadata__": metadata, **self.index}).encode()
        header += b" " * (-len(header) % 8)
        return struct.pack("<Q", len(header)) + header + bytes(self.content)

    def _digest(self, entry: Any) -> str:
        """The digest that a tensor should have; empty if its place in the file is nonsense."""
        try:
            start, end = entry["data_offsets"]
            found = hashlib.sha256(f"{_TYPES[entry['dtype']]} {tuple(entry['shape'])}".encode())
            found.update(self.content[start:end])
        except (KeyError, TypeError, ValueError):
            return ""
        return found.hexdigest()


Mutation: TypeAlias = Callable[[bytes, bytes, random.Random], bytes]
"""Makes a mutated file of the bytes of two honest ones and a source of randomness."""


def _damage(data: bytes, other: bytes, dice: random.Random) -> bytes:
    """Changes a few bytes."""
    changed = bytearray(data)
    for _ in range(dice.randint(1, 16)):
        changed[dice.randrange(len(changed))] = dice.randrange(256)
    return bytes(changed)


def _cut(data: bytes, other: bytes, dice: random.Random) -> bytes:
    """Cuts the file off, and may add random bytes."""
    where = dice.randrange(len(data))
    return data[:where] + dice.randbytes(dice.choice((0, 0, 1, 100)))


def _splice(data: bytes, other: bytes, dice: random.Random) -> bytes:
    """Puts a piece of another file in."""
    start, end = sorted(dice.choices(range(len(data)), k=2))
    place = dice.randrange(len(other))
    return data[:start] + other[place : place + end - start] + data[end:]


def _forge_header(data: bytes, other: bytes, dice: random.Random) -> bytes:
    """Changes the update's own header."""
    parts = UpdateParts.read(data)
    for _ in range(dice.randint(1, 3)):
        parts.fields = _changed(parts.fields, dice)
    return parts.signed()


def _forge_index(data: bytes, other: bytes, dice: random.Random) -> bytes:
    """Changes the list of tensors."""
    parts = UpdateParts.read(data)
    parts.index = _changed(parts.index, dice)
    if not isinstance(parts.index, dict):
        parts.index = {"x": parts.index}
    return parts.signed()


def _forge_content(data: bytes, other: bytes, dice: random.Random) -> bytes:
    """Changes bytes of tensors."""
    parts = UpdateParts.read(data)
    for _ in range(dice.randint(1, 4)):
        parts.content[dice.randrange(len(parts.content))] = dice.randrange(256)
    return parts.signed()


def _forge_table(data: bytes, other: bytes, dice: random.Random) -> bytes:
    """Makes one field of the header a table of another type, far longer, or with long names."""
    parts = UpdateParts.read(data)
    field = dice.choice(sorted(parts.fields))
    table, times = parts.fields[field], dice.choice((3, 100, 3000))
    pairs = list(table.items()) if isinstance(table, dict) else [[table, table]]
    parts.fields[field] = dice.choice(
        (
            pairs,
            [key for key, _ in pairs],
            {str(value)[:99]: key for key, value in pairs},
            {key * times: value for key, value in pairs if isinstance(key, str)},
            {f"{key}{index}": value for key, value in pairs[:1] for index in range(times)},
            dict.fromkeys((str(key) for key, _ in pairs), dice.choice(_VALUES)),
            table * times if isinstance(table, str | list) else [pairs] * times,
        )
    )
    return parts.signed()


def _forge_layers(data: bytes, other: bytes, dice: random.Random) -> bytes:
    """Puts the same parameters into other layers, or layers into other places and shapes."""
    parts = UpdateParts.read(data)
    layers = parts.fields["layers"]
    for _ in range(dice.randint(1, 2)):
        one, two = dice.choice(layers), dice.choice(layers)
        match dice.randrange(7):
            case 0:
                dice.shuffle(layers)
            case 1:
                one["parameters"], two["parameters"] = two["parameters"], one["parameters"]
            case 2 if one["parameters"]:
                two["parameters"].append(one["parameters"].pop())
            case 3:
                one["parameters"].reverse()
            case 4:
                layers.extend(copy.deepcopy(one) for _ in range(dice.choice((1, 50, 2000))))
            case 5:
                one["name"] = dice.choice((two["name"], one["name"] + "/x", "n" * 2000, ""))
            case _:
                for parameter in one["parameters"]:
                    parameter[1].reverse()
    return parts.signed()


def _forge_numbers(data: bytes, other: bytes, dice: random.Random) -> bytes:
    """Writes numbers from the ends of the types into tensors, and into what tells of packing."""
    parts = UpdateParts.read(data)
    for _ in range(dice.randint(1, 3)):
        entry = parts.index[dice.choice(sorted(parts.index))]
        start, end = entry["data_offsets"]
        form = {"F32": "<f", "F64": "<d"}.get(entry["dtype"], "<B")
        step = struct.calcsize(form)
        value = dice.randrange(256) if form == "<B" else dice.choice(_ENDS)
        places = range(start, end, step)
        for place in places if dice.random() < 0.5 else dice.choices(places, k=min(len(places), 2)):
            struct.pack_into(form, parts.content, place, value)
    for packed in parts.fields["quantized"].values():
        if dice.random() < 0.2:
            packed[dice.choice(("step", "tail"))] = dice.choice(_ENDS)
        if dice.random() < 0.2:
            packed["rank"] = dice.choice((0, 1, 2, 3, 2**20))
    return parts.signed()


MUTATIONS: dict[str, Mutation] = {
    "bytes changed": _damage,
    "cut or extended": _cut,
    "two files spliced": _splice,
    "header forged": _forge_header,
    "index forged": _forge_index,
    "content forged": _forge_content,
    "table forged": _forge_table,
    "layers forged": _forge_layers,
    "numbers forged": _forge_numbers,
}
"""Every way to mutate a file, by name; forged files are signed anew."""


def _changed(value: Any, dice: random.Random) -> Any:
    """Replaces, removes or doubles one value somewhere in JSON."""
    if not isinstance(value, dict | list) or not value or dice.random() < 0.1:
        return copy.deepcopy(dice.choice(_VALUES))
    if isinstance(value, dict):
        key = dice.choice(sorted(value))
        match dice.randrange(8):
            case 0:
                del value[key]
            case 1:
                value[dice.choice(("x", "", "a/b", key + "\x00"))] = copy.deepcopy(value[key])
            case _:
                value[key] = _changed(value[key], dice)
        return value
    index = dice.randrange(len(value))
    match dice.randrange(8):
        case 0:
            del value[index]
        case 1:
            value.insert(index, copy.deepcopy(value[index]))
        case _:
            value[index] = _changed(value[index], dice)
    return value
