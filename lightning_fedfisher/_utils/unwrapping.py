"""A module as it was written, without what others have wrapped it or its parts into."""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType

from torch import nn

COMPILED_FROM = "_torchdynamo_orig_callable"
"""Attribute of a function that `torch.compile` made, which holds what it was made from."""

# Of each wrapper, by the name of its class, the attribute that holds what it wraps. By name, as to
# import them all would take seconds and packages that nobody needs.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "_FabricModule": "_original_module",
}


def unwrapped(model: nn.Module, parameters: Mapping[int, nn.Parameter] | None = None) -> nn.Module:
    """Gives a module in which no part is wrapped, so that its parameters have their own names.

    `torch.compile` puts ``_orig_mod.`` into the names of all parameters of what it compiles, and
    data parallelism ``module.``. One client's update would not fit another's, who trains the same
    network without.

    Args:
        model: Any module. It is not changed.
        parameters: Parameters that take the place of the module's, by the `id` of these; None for
            none.

    Returns:
        The module itself if it has no wrappers and keeps its parameters. Else one that shares all
        parameters, buffers and other attributes with it.

    Example:
        >>> import torch
        >>> model = nn.Sequential(torch.compile(nn.Linear(2, 1)))
        >>> [name for name, _ in model.named_parameters()]
        ['0._orig_mod.weight', '0._orig_mod.bias']
        >>> [name for name, _ in unwrapped(model).named_parameters()]
        ['0.weight', '0.bias']
    """
    return _rebuilt(model, parameters or {}, {})


def _rebuilt(
    module: nn.Module,
    parameters: Mapping[int, nn.Parameter],
    done: dict[int, nn.Module],
) -> nn.Module:
    while (held := _WRAPPERS.get(type(module).__name__)) is not None:
        inner = getattr(module, held, None)
        if not isinstance(inner, nn.Module):
            break
        module = inner
    if id(module) in done:
        return done[id(module)]
    children = {
        name: None if child is None else _rebuilt(child, parameters, done)
        for name, child in module._modules.items()
    }
    own = {name: parameters.get(id(p), p) for name, p in module._parameters.items()}
    same = all(children[name] is child for name, child in module._modules.items())
    if not same or any(own[name] is not p for name, p in module._parameters.items()):
        rebuilt = object.__new__(type(module))
        vars(rebuilt).update(vars(module))
        vars(rebuilt).update(_modules=children, _parameters=own)
        for name, value in vars(module).items():
            method = getattr(value, COMPILED_FROM, value)
            if isinstance(method, MethodType) and method.__self__ is module:
                vars(rebuilt)[name] = MethodType(method.__func__, rebuilt)
        done[id(module)] = rebuilt
        return rebuilt
    done[id(module)] = module
    return module
