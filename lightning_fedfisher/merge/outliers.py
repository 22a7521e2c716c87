"""Clients that weigh far more than the median client: found, and named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_fedfisher._utils.text import terminal_text
from lightning_fedfisher.distributed.progress import progress_bar
from lightning_fedfisher.merge.influence_cap import DEFAULT_MAX_INFLUENCE, MEASURES
from lightning_fedfisher.merge.layer_loader import LayerLoader
from lightning_fedfisher.merge.methods import METHODS
from lightning_fedfisher.merge.typical_curvature import FEWEST
from lightning_fedfisher.update.client_update import ClientUpdate

# The default method works with roots of the curvature and of the samples; a distance has none.
_AS_SENT = {"information": 2, "distance": 1, "pull": 2}
# Of the bound: whoever is this near to it is named.
_NEAR = 0.75
# Where there is no bound, what no client of 27 honest federations weighed.
_FAR = 5.0


def describe_outliers(
    influence: Tensor,
    clients: Sequence[str],
    layers: Sequence[str],
    max_influence: float = math.inf,
    usual: Sequence[float] | None = None,
) -> str:
    """Names the clients that weigh far more than the median client, or almost all that they may.

    Args:
        influence: `influence_cap.measure` of every layer, of shape ``(layers, clients, 3)``.
        clients: The clients' names.
        layers: The layers' names.
        max_influence: Multiple of the median client's at which each client is capped.
        usual: For each measure, the multiple up to which nothing is said; None for three quarters
            of `max_influence`, or 5 where there is no bound.

    Returns:
        A line for each such client, with what and where, and a line on what is done about it;
        empty if there is none, or if there are fewer than three clients to compare.

    Example:
        >>> influence = torch.tensor([[[1.0, 1.0, 1.0], [50.0, 1.0, 1.0], [1.0, 1.0, 1.0]]])
        >>> print(describe_outliers(influence, ["ann", "bob", "cid"], ["fc"]).splitlines()[0])
        bob has, of the median client's, 50 times the information in fc
    """
    if len(clients) < FEWEST:
        return ""
    if usual is None:
        most = _NEAR * max_influence if max_influence < math.inf else _FAR
        usual = [max(most, 1.0)] * len(MEASURES)
    lines = []
    for name, own in zip(clients, influence.unbind(1), strict=True):
        found = []
        for what, values, limit in zip(MEASURES, own.unbind(1), usual, strict=True):
            order = values.argsort(descending=True, stable=True).tolist()
            if where := [layers[index] for index in order if values[index] > limit]:
                more = f" and {len(where) - 3} more layers" if len(where) > 3 else ""
                found.append((float(values.max()), f"{what} in {', '.join(where[:3])}{more}"))
        if found:
            told = ", ".join(f"{times:.3g} times the {what}" for times, what in sorted(found)[::-1])
            lines.append(f"{name} has, of the median client's, {told}")
    if not lines:
        return ""
    if max_influence < math.inf:
        cap = f"max_influence caps each of these at {max_influence:g} times the median client's"
    else:
        cap = f"max_influence does not cap it: merge with max_influence={DEFAULT_MAX_INFLUENCE:g}"
    lines.append(
        f"{cap}. This is usual where clients hold different data; of one that you do not trust, "
        "ask for its number of samples and its training, or leave its update out"
    )
    return "\n".join(lines)


def outliers_as_sent(updates: Sequence[ClientUpdate]) -> str:
    """Names the clients that weigh far more than the median client, before any merge.

    Args:
        updates: The updates of all clients, found to belong together.

    Returns:
        As `describe_outliers`, judged by the curvature as it was sent.

    Example:
        >>> from torch import nn
        >>> from lightning_fedfisher.layers import find_layers
        >>> from lightning_fedfisher.update import UpdateHeader
        >>> model = nn.Linear(2, 1)
        >>> header = UpdateHeader(
        ...     10, "identity", "", "categorical", 0, find_layers(model), {"weight": "identity"}
        ... )
        >>> updates = [ClientUpdate.from_model(model, header, {})] * 3
        >>> outliers_as_sent(updates)
        ''
    """
    as_sent = replace(METHODS["fisher_merge"], curvatures=())
    loader = LayerLoader(updates, as_sent)
    device = torch.device("cpu")
    indices = progress_bar(range(len(loader.layers)), "weigh")
    influence = torch.stack([loader.read(index, device).influence for index in indices])
    usual = [(_NEAR * DEFAULT_MAX_INFLUENCE) ** _AS_SENT[what] for what in MEASURES]
    names = [terminal_text(layer.name) for layer in loader.layers]
    clients = [terminal_text(update.source) for update in updates]
    return describe_outliers(influence, clients, names, usual=usual)
