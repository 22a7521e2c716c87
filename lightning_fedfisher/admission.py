"""Admission to a merge: which updates are usable, and which belong together."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lightning_fedfisher.layers import aliases
from lightning_fedfisher.methods import Method
from lightning_fedfisher.progress import is_first, shown
from lightning_fedfisher.update import ClientUpdate
from lightning_fedfisher.update_file import digest
from lightning_fedfisher.update_header import UpdateError

UpdateSource = str | os.PathLike[str] | ClientUpdate


class MergeError(ValueError):
    """The updates cannot be merged: some are unusable, or they do not belong together."""

    def __init__(self, offenders: Sequence[str]) -> None:
        """Lists every offender in one message.

        Args:
            offenders: one line for each update refused, with the reason.
        """
        self.offenders = tuple(offenders)
        super().__init__("These updates cannot be merged:\n" + "\n".join(offenders))


def open_updates(sources: Sequence[UpdateSource], method: Method, name: str) -> list[ClientUpdate]:
    """Opens every update, reads it once, and refuses all bad ones together.

    Of several processes only the first reads all: it starts before the others, or takes them with
    it. What they read later is checked against the same digests.

    Args:
        sources: update files or `ClientUpdate` objects, one for each client.
        method: the merge method they are for.
        name: of the method, for messages.

    Returns:
        The updates, in the order given.

    Raises:
        MergeError: naming every update that is missing, corrupt, of another model, or without the
            curvature the method needs.
    """
    if isinstance(sources, str | os.PathLike):
        raise MergeError([f"{sources!s} is one path: pass a list of update files"])
    if isinstance(sources, ClientUpdate):
        raise MergeError([f"{sources.source} is one update: pass a list of them"])
    if not sources:
        raise MergeError(["there are none: pass the update files of at least one client"])
    opened: list[ClientUpdate] = []
    offenders: list[str] = []
    for source in shown(sources, "verify"):
        try:
            update = source if isinstance(source, ClientUpdate) else ClientUpdate.open(source)
            if is_first():
                update.verify()
        except (UpdateError, FileNotFoundError) as error:
            offenders.append(str(error))
            continue
        opened.append(update)
        if refusal := method.refusal(update.header.curvature, update.header.fisher):
            offenders.append(f"{update.source} {refusal}, as method {name!r} needs")
    for update in opened[1:]:
        ours, theirs = (
            (u.header.curvature, u.header.fisher, u.header.likelihood) for u in (opened[0], update)
        )
        if method.curvatures and ours != theirs:
            offenders.append(
                f"{update.source} holds {' '.join(theirs)} curvature, {opened[0].source} "
                f"{' '.join(ours)}: extract both alike"
            )
        kinds, wanted = update.header.kinds, opened[0].header.kinds
        if method.curvatures and (odd := _unlike(wanted, kinds)):
            offenders.append(
                f"{update.source} was treated unlike {opened[0].source}: "
                + ", ".join(f"layer {name} is {theirs}, not {mine}" for name, mine, theirs in odd)
            )
        if method.curvatures and (odd := _unlike(_wiring(opened[0]), _wiring(update))):
            offenders.append(
                f"{update.source} ran its layers otherwise than {opened[0].source}: "
                + ", ".join(f"{name} is {theirs}, not {mine}" for name, mine, theirs in odd)
            )
        if differences := _differences(opened[0], update):
            offenders.append(
                f"{update.source} is of another model than {opened[0].source}: {differences}"
            )
    if offenders:
        raise MergeError(offenders)
    return opened


def _wiring(update: ClientUpdate) -> dict[str, object]:
    """What each layer reads, and which one is the head."""
    header = update.header
    wiring: dict[str, object] = {
        f"the source of {name}": f"{source.layer} ({source.activation})"
        for name, source in header.sources.items()
    }
    return wiring | {"the head": header.head or "absent"}


def _differences(first: ClientUpdate, second: ClientUpdate) -> str:
    """How the architectures of two updates differ; empty if they do not."""

    def describe(update: ClientUpdate) -> dict[str, object]:
        parts: dict[str, object] = {
            name: f"{shape} {str(dtype).removeprefix('torch.')}"
            for name, (shape, dtype) in update.forms.items()
        }
        parts |= {n: _frozen_at(d) for n, d in update.header.frozen.items()}
        return parts | {n: f"another name of {a}" for n, a in update.header.aliases.items()}

    unlike = _unlike(describe(first), describe(second))
    return ", ".join(f"{name} is {theirs}, not {mine}" for name, mine, theirs in unlike)


def check_fit(model: nn.Module, state: Mapping[str, Tensor], frozen: Mapping[str, str]) -> None:
    """Refuses a model that cannot take the merged weights.

    Args:
        model: to be loaded with them.
        state: the merged parameters and buffers by name.
        frozen: digests of the parameters that the model must bring along.

    Raises:
        ValueError: naming every parameter and buffer that differs.
    """
    # Other names of a frozen parameter are neither merged nor brought along twice.
    twice = {name for name, first in aliases(model).items() if first in frozen}
    own: dict[str, object] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):  # a module's extra state
            continue
        if name in frozen:
            own[name] = _frozen_at(digest(tensor.detach().cpu()))
        elif name not in twice:
            own[name] = tuple(tensor.shape)
    new: dict[str, object] = {name: tuple(tensor.shape) for name, tensor in state.items()}
    new |= {name: _frozen_at(found) for name, found in frozen.items()}
    unlike = _unlike(own, new)
    if unlike:
        wrong = (
            f"{name} is {mine} in it, {theirs} in the updates" for name, mine, theirs in unlike
        )
        raise ValueError("the model does not fit the updates: " + "; ".join(wrong))


def _frozen_at(found: str) -> str:
    return f"frozen with digest {found[:8]}"


def _unlike(
    one: Mapping[str, object], other: Mapping[str, object]
) -> list[tuple[str, object, object]]:
    """Names under which two tables differ, with what each holds there."""
    return [
        (name, one.get(name, "absent"), other.get(name, "absent"))
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    ]
