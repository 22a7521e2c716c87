"""``fedfisher verify``: whether update files are sound and belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jsonargparse import Namespace
from torch import Tensor

from lightning_fedfisher._utils.progress import progress_bar
from lightning_fedfisher.cli.inputs import expand_patterns, make_model
from lightning_fedfisher.cli.terminal import REFUSED, complain, show
from lightning_fedfisher.merge.compatibility import check_model, examine
from lightning_fedfisher.merge.influence_cap import USUAL, unusual
from lightning_fedfisher.merge.layer_loader import LayerProblems
from lightning_fedfisher.merge.methods import METHODS
from lightning_fedfisher.update.client_update import ClientUpdate


def run(flags: Namespace) -> int:
    """Checks update files and prints a line for each, with the reasons of a refusal.

    Args:
        flags: ``files`` and ``model``.

    Returns:
        The exit status: 1 if a file is refused, else 0.
    """
    files, model = expand_patterns(flags.files), make_model(flags.model)
    examined = examine(files)
    for found in examined:
        if found.update and model and not found.offenders:
            try:
                check_model(model, _without_values(found.update), found.update.header.frozen)
            except ValueError as error:
                found.offenders.append(f"{found.source}: {error}")
    for found in examined:
        if found.update and not found.offenders:
            header = found.update.header
            told = f"{header.num_samples} samples, {header.curvature} {header.fisher}".rstrip()
            show(f"ok       {found.source}: {told}")
        else:
            show(f"REFUSED  {found.source}")
            for reason in found.offenders:
                show(*(f"         {line}" for line in reason.splitlines()))
    usable = [found.update for found in examined if found.update and not found.offenders]
    print(f"{len(usable)} of {len(examined)} updates are usable")
    if len(usable) > 1 and (told := outliers_as_sent(usable)):
        complain(f"warning: {told}")
    return 0 if len(usable) == len(examined) else REFUSED


def outliers_as_sent(updates: Sequence[ClientUpdate]) -> str:
    """Names the clients that weigh far more than the median one, by their curvature as sent."""
    as_sent = replace(METHODS["fisher_merge"], curvatures=())
    problems = LayerProblems(updates, as_sent, memory_budget=2**30)
    for index in progress_bar(range(len(updates[0].layers)), "weigh"):
        problems.read(index, torch.device("cpu"), [])
    names = [layer.name for layer in updates[0].layers]
    clients = [update.source for update in updates]
    # The default method works with roots of the curvature and of the samples.
    usual = (USUAL**2, USUAL, USUAL**2)
    return unusual(problems.weighed, clients, names, usual=usual)


def _without_values(update: ClientUpdate) -> dict[str, Tensor]:
    """Makes the state dict of an update's model on the meta device: shapes without values."""
    state = {n: torch.empty(s, dtype=d, device="meta") for n, (s, d) in update.specs.items()}
    return state | {name: state[first] for name, first in update.header.aliases.items()}
