"""Copies any module that can be trained, whatever it keeps beside its weights.

`copy.deepcopy` gives up at the first thing it does not know: a tensor that still hangs in a graph,
as pruning and hook-based weight norms leave one on every layer, a lock, an open file, an iterator.
None of them is a reason not to run a model. And it copies no function: a hook, or a forward pass
that was set on an instance, would go on with the original's parts.
"""

from __future__ import annotations

import copy
import functools
import io
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from types import CellType, FrameType, FunctionType, GeneratorType, MethodType
from typing import Any

from torch import Tensor, nn

from lightning_fedfisher._utils.unwrapping import COMPILED_FROM

_CONTAINERS = (dict, OrderedDict, list, tuple, set)
# What is known to have no copy, so that no attempt fails for it.
_SHARED = (type(threading.Lock()), type(threading.RLock()), io.IOBase, GeneratorType)
# Tables of a module that hold its parts, and not what it keeps beside them.
_PARTS = ("_parameters", "_buffers", "_modules")


def deep_copy(model: nn.Module, known: Mapping[int, object] | None = None) -> nn.Module:
    """Copies a module and all that it holds, as far as it can be copied.

    A tensor in a graph is copied without the graph. What else cannot be copied, or does something
    when it is deleted, is shared with the original. Functions that refer to parts of the module, as
    hooks and compiled forward passes do, refer to the copied parts in the copy.

    Args:
        model: Any module. It is not changed.
        known: Copies of some of its parts, by the parts' `id`; None for none.

    Returns:
        The copy.

    Raises:
        Exception: Whatever a module, or a parameter, raises that does not want to be copied.

    Example:
        >>> import threading
        >>> model = nn.Linear(2, 1)
        >>> model.lock, model.last = threading.Lock(), model(model.weight.new_zeros(1, 2))
        >>> copied = deep_copy(model)
        >>> copied.lock is model.lock, copied.last.requires_grad, copied.weight is model.weight
        (True, False, False)
    """
    known = dict(known or {}) | _empty_dicts(model)
    for value in _kept(model):
        if isinstance(value, Tensor):
            if value.grad_fn is not None:
                known[id(value)] = value.detach().clone()
        elif isinstance(value, _SHARED) or (hasattr(type(value), "__del__") and _is_apart(value)):
            known[id(value)] = value
    while True:
        memo = dict(known)
        try:
            copied = copy.deepcopy(model, memo)
        except Exception as error:  # whatever a part raises that does not want to be copied
            part = _part_that_failed(error)
            if part is None or id(part) in known:
                raise
            if isinstance(part, nn.Module | nn.Parameter):  # shared, it would be the user's own
                name = type(part).__name__
                error.add_note(f"Curvature is extracted on a copy, and {name} cannot be copied")
                raise
            # Tensors are copied once, however many other parts make a new attempt necessary.
            known |= {key: made for key, made in memo.items() if isinstance(made, Tensor)}
            known[id(part)] = part.detach().clone() if isinstance(part, Tensor) else part
            continue
        for module in model.modules():
            _rebind(module, memo)
        return copied


def _empty_dicts(model: nn.Module) -> dict[int, object]:
    """Copies the empty dictionaries of hooks, of which every module has a dozen, for `deepcopy`.

    It would take longer for them than for all the rest.
    """
    found = (value for module in model.modules() for value in vars(module).values())
    return {id(d): type(d)() for d in found if type(d) in (dict, OrderedDict) and not d}


def _kept(model: nn.Module) -> Iterator[object]:
    """What modules keep beside parameters, buffers and modules, in containers too."""
    for module in model.modules():
        yield from _flattened([value for name, value in vars(module).items() if name not in _PARTS])


def _flattened(values: list[Any]) -> Iterator[object]:
    """What is in a list, and in the containers in it."""
    while values:
        value = values.pop()
        if type(value) in _CONTAINERS:
            values.extend(value.values() if isinstance(value, dict) else value)
        else:
            yield value


def _is_apart(part: object) -> bool:
    """Tells whether an object holds no module and no tensor, as far as its attributes show."""
    held = vars(part).values() if hasattr(part, "__dict__") else ()
    return not any(isinstance(v, nn.Module | Tensor) for v in _flattened([*held]))


def _part_that_failed(error: BaseException) -> object | None:
    """What to share, of the objects that `copy.deepcopy` was asked to copy when it failed.

    That is the innermost one, or the outermost around it that holds nothing of the module: half a
    copy of a thread pool or of a temporary file would interfere with the original.
    """
    frames: list[FrameType] = []
    step = error.__traceback__
    while step is not None:
        frames.append(step.tb_frame)
        step = step.tb_next
    asked = [f.f_locals.get("x") for f in frames if f.f_code is copy.deepcopy.__code__]
    if not asked:
        return None
    part = asked[-1]
    for around in reversed(asked[:-1]):
        if isinstance(around, nn.Module | Tensor) or isinstance(part, nn.Module | Tensor):
            break
        if type(around) not in _CONTAINERS and _is_apart(around):
            part = around
    return part


def _rebind(module: nn.Module, copies: Mapping[int, Any]) -> None:
    """Has the functions of a module's copy refer to copied parts, and run what was compiled."""
    copied = copies.get(id(module))
    if not isinstance(copied, nn.Module) or copied is module:
        return
    vars(copied).pop("_compiled_call_impl", None)
    if vars(module).get("_trainer") is not None:  # which a LightningModule leaves out of copies
        vars(copied)["_trainer"] = vars(module)["_trainer"]
    for name, value in vars(copied).items():
        if name in _PARTS:
            continue
        if isinstance(value, dict):
            for key, held in value.items():
                if (made := _rebound(held, copies)) is not held:
                    value[key] = made
        else:
            vars(copied)[name] = _rebound(value, copies)


def _rebound(value: Any, copies: Mapping[int, Any], depth: int = 4) -> Any:
    """A function in which parts are replaced by their copies; the very same if none are."""
    value = getattr(value, COMPILED_FROM, value)
    if depth == 0:
        return value
    if isinstance(value, MethodType):
        owner = copies.get(id(value.__self__), value.__self__)
        return value if owner is value.__self__ else MethodType(value.__func__, owner)
    if isinstance(value, functools.partial):
        found = [_replaced(v, copies, depth) for v in (value.func, *value.args)]
        words = {key: _replaced(v, copies, depth) for key, v in value.keywords.items()}
        return functools.partial(found[0], *found[1:], **words)
    if not isinstance(value, FunctionType):
        return value
    held = [_contents(cell) for cell in value.__closure__ or ()]
    kept = [_replaced(part, copies, depth) for part in held]
    usual = [_replaced(part, copies, depth) for part in value.__defaults__ or ()]
    same = all(new is old for new, old in zip(kept, held, strict=True))
    if same and all(a is b for a, b in zip(usual, value.__defaults__ or (), strict=True)):
        return value
    cells = tuple(CellType() if part is _EMPTY else CellType(part) for part in kept)
    made = FunctionType(
        value.__code__, value.__globals__, value.__name__, tuple(usual) or None, cells or None
    )
    made.__kwdefaults__ = value.__kwdefaults__
    return made


_EMPTY = object()


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return _EMPTY


def _replaced(part: Any, copies: Mapping[int, Any], depth: int) -> Any:
    return copies[id(part)] if id(part) in copies else _rebound(part, copies, depth - 1)
