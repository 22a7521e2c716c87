"""Copies any module that can be trained, whatever it keeps beside its weights.

`copy.deepcopy` gives up at the first thing it does not know: a tensor that still hangs in a graph,
as pruning and hook-based weight norms leave one on every layer, a lock, an open file, an iterator.
None of them is a reason not to run a model.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from types import FrameType, MethodType
from typing import Any

from torch import Tensor, nn

from lightning_fedfisher._utils.unwrapping import COMPILED_FROM


def deep_copy(model: nn.Module, known: Mapping[int, object] | None = None) -> nn.Module:
    """Copies a module and all that it holds, as far as it can be copied.

    A tensor in a graph is copied without the graph. What else cannot be copied is shared with the
    original. Compiled forward passes and methods, which belong to the original alone, are replaced
    by those that were compiled.

    Args:
        model: Any module. It is not changed.
        known: Copies of some of its parts, by the parts' `id`; None for none.

    Returns:
        The copy.

    Raises:
        Exception: Whatever a part raises that is copied by a function of its own and can be found
            nowhere in the module.

    Example:
        >>> import threading
        >>> model = nn.Linear(2, 1)
        >>> model.lock, model.last = threading.Lock(), model(model.weight.new_zeros(1, 2))
        >>> copied = deep_copy(model)
        >>> copied.lock is model.lock, copied.last.requires_grad, copied.weight is model.weight
        (True, False, False)
    """
    known = dict(known or {}) | _empty_dicts(model)
    known |= {id(t): t.detach().clone() for t in _kept_tensors(model) if t.grad_fn is not None}
    while True:
        memo = dict(known)
        try:
            copied = copy.deepcopy(model, memo)
        except Exception as error:  # whatever a part raises that does not want to be copied
            part = _part_that_failed(error)
            if part is None or id(part) in known or part is model:
                raise
            # Tensors are copied once, however many other parts make a new attempt necessary.
            known |= {key: made for key, made in memo.items() if isinstance(made, Tensor)}
            known[id(part)] = part.detach().clone() if isinstance(part, Tensor) else part
            continue
        for module in model.modules():
            _uncompile(module, memo)
        return copied


def _empty_dicts(model: nn.Module) -> dict[int, object]:
    """Copies the empty dictionaries of hooks, of which every module has a dozen, for `deepcopy`.

    It would take longer for them than for all the rest.
    """
    found = (value for module in model.modules() for value in vars(module).values())
    return {id(d): type(d)() for d in found if type(d) in (dict, OrderedDict) and not d}


def _kept_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that modules keep beside parameters and buffers, in containers too."""
    for module in model.modules():
        own = vars(module)
        held = [own[name] for name in own if name not in ("_parameters", "_buffers", "_modules")]
        while held:
            value = held.pop()
            if isinstance(value, Tensor):
                yield value
            elif type(value) in (dict, OrderedDict):
                held.extend(value.values())
            elif type(value) in (list, tuple):
                held.extend(value)


def _part_that_failed(error: BaseException) -> object | None:
    """The innermost object that `copy.deepcopy` was asked to copy when it failed."""
    frames: list[FrameType] = []
    step = error.__traceback__
    while step is not None:
        frames.append(step.tb_frame)
        step = step.tb_next
    asked = [f.f_locals.get("x") for f in frames if f.f_code is copy.deepcopy.__code__]
    return asked[-1] if asked else None


def _uncompile(module: nn.Module, copies: Mapping[int, Any]) -> None:
    """Makes a module's copy run its own code, and not the original's that was compiled."""
    copied = copies.get(id(module))
    if not isinstance(copied, nn.Module):
        return
    vars(copied).pop("_compiled_call_impl", None)
    for name, value in vars(module).items():
        method = getattr(value, COMPILED_FROM, None)
        if isinstance(method, MethodType) and id(method.__self__) in copies:
            vars(copied)[name] = MethodType(method.__func__, copies[id(method.__self__)])
