"""``fedfisher dashboard``: a W&B workspace and a W&B report of one federation."""

from __future__ import annotations

import json

from jsonargparse import Namespace

from lightning_fedfisher.cli.terminal import show


def run(flags: Namespace) -> int:
    """Saves the dashboards of a federation and prints their addresses.

    Args:
        flags: ``entity``, ``project``, ``group`` and ``dry_run``.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: If the extra ``dashboard`` is not installed, or W&B refuses.
    """
    try:
        from lightning_fedfisher.tracking.wandb_workspace import planned, report, save, workspace
    except ImportError as error:  # of an extra
        raise ValueError(str(error)) from error
    names = flags.entity, flags.project, flags.group
    if flags.dry_run:
        print(json.dumps(planned(*names), indent=2))
        return 0
    for made in (workspace(*names), report(*names)):
        show(save(made))
    return 0
