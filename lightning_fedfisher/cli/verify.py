"""``fedfisher verify``: whether update files are sound and belong together."""

from __future__ import annotations

import torch
from jsonargparse import Namespace
from torch import Tensor

from lightning_fedfisher.cli.inputs import expand_patterns, make_model
from lightning_fedfisher.cli.terminal import REFUSED, complain, show
from lightning_fedfisher.merge.compatibility import check_model, check_updates
from lightning_fedfisher.merge.outliers import outliers_as_sent
from lightning_fedfisher.update.client_update import ClientUpdate


def run(flags: Namespace) -> int:
    """Checks update files and prints a line for each, with the reasons of a refusal.

    Args:
        flags: ``files`` and ``model``.

    Returns:
        The exit status: 1 if a file is refused, else 0.
    """
    files, model = expand_patterns(flags.files), make_model(flags.model)
    checked = check_updates(files)
    for found in checked:
        if found.update and model and not found.offenders:
            try:
                check_model(model, _without_values(found.update), found.update.header.frozen)
            except ValueError as error:
                found.offenders.append(f"{found.source}: {error}")
    for found in checked:
        if found.update and not found.offenders:
            header = found.update.header
            told = f"{header.num_samples} samples, {header.curvature} {header.fisher}".rstrip()
            show(f"ok       {found.source}: {told}")
        else:
            show(f"REFUSED  {found.source}")
            for reason in found.offenders:
                show(*(f"         {line}" for line in reason.splitlines()))
    usable = [found.update for found in checked if found.update and not found.offenders]
    print(f"{len(usable)} of {len(checked)} updates are usable")
    if len(usable) > 1 and (told := outliers_as_sent(usable)):
        complain(f"warning: {told}")
    return 0 if len(usable) == len(checked) else REFUSED


def _without_values(update: ClientUpdate) -> dict[str, Tensor]:
    """Makes the state dict of an update's model on the meta device: shapes without values."""
    state = {n: torch.empty(s, dtype=d, device="meta") for n, (s, d) in update.specs.items()}
    return state | {name: state[first] for name, first in update.header.aliases.items()}
