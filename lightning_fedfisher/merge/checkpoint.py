"""What tells one merge from another, so that a checkpoint is resumed by its own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from types import CodeType, FunctionType

from lightning_fedfisher.merge.methods import MergeMethod
from lightning_fedfisher.update.client_update import ClientUpdate


def fingerprint(method: str | MergeMethod, updates: Sequence[ClientUpdate]) -> str:
    """Tells one merge from another, alike in every process.

    Args:
        method: its name, or a row of one's own, told by its fields: a function by its name, code
            and the numbers and words it carries, any other object by its type.
        updates: of all clients, in order, told by what is sent, without the metadata; hashes those
            in memory.

    Returns:
        In hexadecimal.
    """
    clients = [
        [dataclasses.asdict(update.header) | {"metadata": {}}, dict(update.digests)]
        for update in updates
    ]
    text = json.dumps([_described(method), clients], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _described(part: object) -> object:
    if part is None or isinstance(part, str | int | float):
        return part
    if isinstance(part, tuple):
        return [_described(item) for item in part]
    if isinstance(part, MergeMethod):
        fields = dataclasses.fields(part)
        return {field.name: _described(getattr(part, field.name)) for field in fields}
    if isinstance(part, partial):
        keywords = {name: _described(value) for name, value in part.keywords.items()}
        return [_described(part.func), _described(part.args), keywords]
    if isinstance(part, CodeType):
        return [part.co_code.hex(), *part.co_names, _described(part.co_consts)]
    if isinstance(part, FunctionType):
        carried = [cell.cell_contents for cell in part.__closure__ or ()]
        carried = [value for value in carried if isinstance(value, str | int | float)]
        defaults = (part.__defaults__, *(part.__kwdefaults__ or {}).items())
        return [_name(part), _described(part.__code__), _described(defaults), carried]
    return _name(part if isinstance(part, type) else type(part))


def _name(part: type | FunctionType) -> str:
    return f"{part.__module__}.{part.__qualname__}"
