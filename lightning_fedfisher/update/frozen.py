"""Parameters that are frozen, and those among them that change all the same.

A frozen parameter is not sent: all clients are taken to have the same one, and its digest tells.
But a teacher that follows its student is frozen too, and no two clients have the same. What changed
while a client trained is sent as what was trained.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lightning_fedfisher._utils.unwrapping import unwrapped
from lightning_fedfisher.layers import frozen_parameters
from lightning_fedfisher.update.file_format import digest


def frozen_digests(model: nn.Module) -> dict[str, str]:
    """Computes the digests of a model's frozen parameters.

    Args:
        model: Any module. It is not changed.

    Returns:
        The digests by name, without the names of wrappers.

    Example:
        >>> frozen_digests(nn.Linear(1, 1))
        {}
    """
    return {n: digest(p.detach().cpu()) for n, p in frozen_parameters(unwrapped(model)).items()}


def with_changed_ones_trained(
    model: nn.Module, before: Mapping[str, str]
) -> tuple[nn.Module, tuple[str, ...]]:
    """Gives a model in which the frozen parameters that changed count as trained.

    Args:
        model: The model after its training. It is not changed.
        before: Its `frozen_digests` before; what was trained then and is frozen now counts as
            changed.

    Returns:
        A module of the same values, which shares their memory, and the names of what changed.
    """
    plain = unwrapped(model)
    now, frozen = frozen_digests(plain), frozen_parameters(plain)
    # What was not frozen before has been trained since.
    changed = tuple(
        name
        for name in now
        if frozen[name].is_floating_point() and now[name] != before.get(name, "")
    )
    trained = {id(frozen[name]): nn.Parameter(frozen[name].detach()) for name in changed}
    return unwrapped(plain, trained), changed
