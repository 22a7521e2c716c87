"""Which updates are usable, which belong together, and which model they fit."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from lightning_fedfisher._utils.text import terminal_lines, terminal_text
from lightning_fedfisher._utils.unwrapping import unwrapped
from lightning_fedfisher.distributed.processes import is_rank_zero, warn_on_rank_zero
from lightning_fedfisher.distributed.progress import progress_bar
from lightning_fedfisher.errors import MergeError, UpdateError
from lightning_fedfisher.layers import aliases
from lightning_fedfisher.merge.methods import MergeMethod
from lightning_fedfisher.update.architecture import frozen_at
from lightning_fedfisher.update.client_update import ClientUpdate
from lightning_fedfisher.update.file_format import digest

_MOST_TOLD = 20  # differences from others: a stranger's file may have thousands

UpdateSource = str | os.PathLike[str] | ClientUpdate


@dataclass
class CheckedUpdate:
    """What was found out about one source.

    Attributes:
        source: The file, or a word for an update in memory.
        update: The opened update; None if it cannot be opened.
        offenders: Reasons to refuse it; none if it is usable.

    Example:
        >>> found = CheckedUpdate("a.safetensors", offenders=["it is truncated"])
        >>> found.update is None
        True
    """

    source: str
    update: ClientUpdate | None = None
    offenders: list[str] = field(default_factory=list)


def open_updates(
    sources: Sequence[UpdateSource],
    method: MergeMethod,
    skip_invalid: bool = False,
    decode: bool = False,
) -> list[ClientUpdate]:
    """Opens every update, reads it once, and refuses all bad ones together.

    Only rank 0 reads every tensor that the method looks at: it starts before the other ranks, or
    stops them with it. What they read later is checked against the same digests. What is quantized
    is decoded when its layer is merged, and refused then if it cannot be.

    Args:
        sources: Update files or `ClientUpdate` objects, one for each client.
        method: The merge method they are for.
        skip_invalid: Whether to leave bad ones out, with a warning, as long as there is a good one.
            All ranks read and decode all of them then, to leave out the same.
        decode: Whether to decode now what is quantized, in any case.

    Returns:
        The updates, in the order given.

    Raises:
        MergeError: Naming every update that is missing, corrupt, of another model, or without the
            curvature that the method needs.
    """
    if isinstance(sources, str | os.PathLike):
        raise MergeError([f"{sources!s} is one path: pass a list of update files"])
    if isinstance(sources, ClientUpdate):
        raise MergeError([f"{sources.source} is one update: pass a list of them"])
    if not sources:
        raise MergeError(["there are none: pass the update files of at least one client"])
    verify = is_rank_zero() or skip_invalid
    checked = check_updates(sources, method, verify=verify, decode=decode or skip_invalid)
    usable = [found.update for found in checked if found.update and not found.offenders]
    refused = [reason for found in checked for reason in found.offenders]
    if refused and not (skip_invalid and usable):
        raise MergeError(refused)
    if refused:
        left_out = f"{len(checked) - len(usable)} of {len(checked)} updates left out:"
        warn_on_rank_zero(terminal_lines("\n".join([left_out, *refused])))
    return usable


def check_updates(
    sources: Sequence[UpdateSource],
    method: MergeMethod | None = None,
    verify: bool = True,
    decode: bool = True,
) -> list[CheckedUpdate]:
    """Finds out which updates are usable, and which belong together.

    Updates are compared with those that most of them are like.

    Args:
        sources: Update files or `ClientUpdate` objects, one for each client.
        method: The merge method they are for; any method if None.
        verify: Whether to read every tensor that the method looks at.
        decode: Whether to decode what is quantized as well; its digest is checked in any case.

    Returns:
        What was found of each source, in the order given.

    Example:
        >>> (found,) = check_updates(["nowhere.safetensors"])
        >>> found.offenders
        ['there is no update file nowhere.safetensors']
    """
    curvature = method is None or not method.ignores_curvature
    checks = partial(ClientUpdate.verify, decode=decode, curvature=curvature) if verify else None
    checked = [_opened(source, checks) for source in progress_bar(sources, "verify")]
    opened = [(found, found.update) for found in checked if found.update]
    any_curvature = method is not None and not method.curvatures
    traits = [_traits(update, any_curvature) for _, update in opened]
    if method is not None:
        for found, update in opened:
            if refusal := method.refusal(update.header):
                told = f"{update.source} {refusal} (method {method.name!r})"
                found.offenders.append(terminal_text(told))
    # In memory and in a file the same tables may be in another order.
    described = [json.dumps(own, sort_keys=True) for own in traits]
    alike = Counter(
        text for (found, _), text in zip(opened, described, strict=True) if not found.offenders
    )
    # The first of those that most are like; not the first of all, who may be the odd one.
    typical = max(range(len(opened)), key=lambda index: alike[described[index]], default=0)
    for (found, update), own in zip(opened, traits, strict=True):
        _, first = opened[typical]
        for says, mine, theirs in zip(_UNLIKE, traits[typical], own, strict=True):
            unlike = _unlike(mine, theirs)
            odd = [f"{what} is {this}, not {that}" for what, that, this in unlike[:_MOST_TOLD]]
            if len(unlike) > _MOST_TOLD:
                odd.append(f"and {len(unlike) - _MOST_TOLD} more")
            if odd:
                told = f"{update.source} {says} {first.source}: {', '.join(odd)}"
                found.offenders.append(terminal_text(told))
                break  # what follows would say it again
    return checked


def _opened(source: UpdateSource, checks: Callable[[ClientUpdate], None] | None) -> CheckedUpdate:
    """Opens a source, and checks what it holds if wanted."""
    if isinstance(source, ClientUpdate):
        found = CheckedUpdate(source.source, source)
    else:
        found = CheckedUpdate(str(source))
    try:
        found.update = found.update or ClientUpdate.open(found.source)
        if checks:
            checks(found.update)
    except (UpdateError, FileNotFoundError) as error:
        return CheckedUpdate(found.source, None, [str(error)])
    return found


_UNLIKE = (
    "is of another model than",
    "was not extracted alike with",
    "was treated unlike",
    "ran its layers otherwise than",
)
"""What is said of differences in `_traits`."""


def _traits(update: ClientUpdate, any_curvature: bool) -> tuple[dict[str, object], ...]:
    """Tables of all that must be alike in updates that are merged."""
    header, model = update.header, update.architecture
    model = model | {
        f"layer {layer.name}": " with ".join(layer.parameter_names) for layer in header.layers
    }
    if any_curvature:
        return model, {}, {}, {}
    extracted = {name: getattr(header, name) for name in ("curvature", "fisher", "likelihood")}
    extracted["fit"] = f"{'no' if header.fit is None else 'a'} least-squares fit"
    if header.fit is not None:  # to what a body gives that must be the same
        digests = update.digests
        model = model | {n: d for n, d in digests.items() if n.startswith("buffers/")}
    wiring: dict[str, object] = {
        f"the source of {name}": f"{source.layer} ({source.activation})"
        for name, source in header.fed_by.items()
    }
    kinds: dict[str, object] = {f"layer {name}": kind for name, kind in header.kinds.items()}
    return model, extracted, kinds, wiring | {"the output layer": header.output_layer or "absent"}


def require_fit(model: nn.Module, update: ClientUpdate) -> None:
    """Refuses a model that cannot take what a merge of such updates gives.

    Args:
        model: The model to be loaded with it; it is not changed.
        update: Any client's update.

    Raises:
        ValueError: If parameters or buffers differ, naming every one.
    """
    header = update.header
    state = {name: torch.empty(spec[0], device="meta") for name, spec in update.specs.items()}
    state |= {name: state[first] for name, first in header.aliases.items()}
    check_model(model, state, header.frozen)


def check_model(model: nn.Module, state: Mapping[str, Tensor], frozen: Mapping[str, str]) -> None:
    """Refuses a model that cannot take the merged weights.

    Args:
        model: The model to be loaded with them; it is not changed.
        state: The merged parameters and buffers by name; only their shapes are looked at.
        frozen: Digests of the parameters that the model must bring along.

    Raises:
        ValueError: If parameters or buffers differ, naming every one.

    Example:
        >>> check_model(nn.Linear(2, 1), {"weight": torch.ones(1, 2), "bias": torch.ones(1)}, {})
        >>> check_model(nn.Linear(2, 1), {"weight": torch.ones(1, 2)}, {})
        Traceback (most recent call last):
        ValueError: the model does not fit the updates: bias is (1,) in it, absent in the updates
    """
    model = unwrapped(model)
    # Other names of a frozen parameter are neither merged nor brought along twice.
    twice = {name for name, first in aliases(model).items() if first in frozen}
    own: dict[str, object] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):  # a module's extra state
            continue
        if name in frozen:
            own[name] = frozen_at(digest(tensor.detach().cpu()))
        elif name not in twice:
            own[name] = tuple(tensor.shape)
    new: dict[str, object] = {name: tuple(tensor.shape) for name, tensor in state.items()}
    new |= {name: frozen_at(found) for name, found in frozen.items()}
    unlike = _unlike(own, new)
    if unlike:
        wrong = (
            f"{name} is {mine} in it, {theirs} in the updates" for name, mine, theirs in unlike
        )
        raise ValueError(terminal_text("the model does not fit the updates: " + "; ".join(wrong)))


def _unlike(
    one: Mapping[str, object], other: Mapping[str, object]
) -> list[tuple[str, object, object]]:
    """Names under which two tables differ, with what each holds there."""
    return [
        (name, one.get(name, "absent"), other.get(name, "absent"))
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    ]
