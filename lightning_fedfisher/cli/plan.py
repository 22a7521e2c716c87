"""``fedfisher plan``: what a model's curvature takes on clients and server, before any training."""

from __future__ import annotations

import torch
from jsonargparse import Namespace

from lightning_fedfisher.cli.inputs import make_model
from lightning_fedfisher.cli.terminal import show
from lightning_fedfisher.plan import plan_update


def run(flags: Namespace) -> int:
    """Prints a plan for each kind of curvature that is asked for.

    Args:
        flags: Those of `make_parser`'s ``plan``.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: If the model or the value of a flag is refused.
    """
    with torch.device("meta"):  # where a model of any size takes no memory
        model = make_model(flags.model)
    assert model is not None
    for curvature in flags.curvature:
        plan = plan_update(
            model,
            curvature,
            clients=flags.clients,
            upload_budget=flags.upload_budget,
            memory_budget=flags.memory_budget,
        )
        show(*plan.report.splitlines(), "")
    return 0
