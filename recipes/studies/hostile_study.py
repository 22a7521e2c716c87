"""Studies what one hostile client does to a merge, by the cap on a client's influence.

A sixth client, who forges its update, joins the five of several federations. All six are merged
with the default method under several caps (see `lightning_fedfisher.merge.influence_cap`).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass

import torch
from jsonargparse import ArgumentParser
from simulation.clients import QUIET, merge
from simulation.data import ImageData
from simulation.federations import Federation
from simulation.study import (
    Client,
    default_update,
    initial_network,
    run_study,
    scores_of,
    study_parser,
)
from torch import Tensor

from lightning_fedfisher import ClientUpdate
from lightning_fedfisher.merge.methods import METHODS
from lightning_fedfisher.update.header import UpdateHeader

_MUCH, _MANY = 1e8, 10**6
BOUNDS = {"none": math.inf, "10": 10.0, "3": 3.0, "2": 2.0}
FEDERATIONS = {
    "development": [
        *(Federation("fashionmnist", "lenet", 0.1, 3, seed) for seed in range(3)),
        *(Federation("fashionmnist", "lenet", 0.05, 3, seed) for seed in range(3)),
        Federation("imagefolder", "cnn", 0.1, 3, 0),
    ]
}
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Row(Federation):
    """A result: accuracy in percent."""

    attack: str
    bound: str
    accuracy: float
    nll: float


def _scaled_curvature(tensors: Tensors, much: float) -> Tensors:
    """Scales every layer's curvature, by one of its factors."""
    return {n: t * much if n.endswith("/row_factor") else t for n, t in tensors.items()}


def _changed_weights(tensors: Tensors, change: Callable[[str, Tensor], Tensor]) -> Tensors:
    """Changes every weight tensor, given its name."""
    return {n: change(n, t) if n.startswith("parameters/") else t for n, t in tensors.items()}


def _noise(name: str, weights: Tensor) -> Tensor:
    """Noise of a hundred times the size of the weights, the same at every call."""
    generator = torch.Generator().manual_seed(len(name))
    return 100 * weights.std() * torch.randn(weights.shape, generator=generator)


def _flat(tensors: Tensors) -> Tensors:
    """Replaces every factor by a large multiple of the identity."""
    return {
        n: 1e4 * torch.eye(len(t)) if n.startswith("curvature/") else t for n, t in tensors.items()
    }


def _opposite(name: str, weights: Tensor) -> Tensor:
    """Turns weights around."""
    return -weights


ATTACKS: Mapping[str, Callable[[Tensors], Tensors]] = {
    "samples": lambda tensors: tensors,
    "curvature": lambda tensors: _scaled_curvature(tensors, _MUCH),
    "opposite weights, curvature": lambda t: _scaled_curvature(
        _changed_weights(t, _opposite), _MUCH
    ),
    "noise for weights": lambda tensors: _changed_weights(tensors, _noise),
    "noise for weights, curvature": lambda t: _scaled_curvature(_changed_weights(t, _noise), _MUCH),
    "opposite weights, flat curvature": lambda t: _flat(_changed_weights(t, _opposite)),
}
"""Each attack changes the tensors of a copy of the first client's update.

Curvature is scaled by 1e8. The attack on ``samples`` scales the number of samples, of which the
merge takes the square root, by 1e6.
"""

SHREWD, NOBODY = "just within the bound", "none"


def forge(updates: Sequence[ClientUpdate], attack: str, bound: float) -> ClientUpdate:
    """Forges the update of the sixth client.

    Args:
        updates: of the honest clients; a copy of the first is changed.
        attack: a key of `ATTACKS`, or `SHREWD`, which knows the cap and the honest updates: it
            moves the weights to the other side of the median, and scales curvature, as far as the
            cap allows.
        bound: the cap on influence, in multiples of the median client's; `SHREWD` takes 10 if it is
            infinite.

    Returns:
        The forged update.
    """
    first = updates[0]
    names = [*(f"parameters/{name}" for name in first.parameters)]
    tensors = {f"parameters/{name}": tensor for name, tensor in first.parameters.items()}
    for name, block in first.blocks.items():
        tensors |= {f"curvature/{name}/{part}": t for part, t in block.tensors().items()}
    header: UpdateHeader = dataclasses.replace(first.header, quantized={}, normalized={})
    if attack == SHREWD:
        most = bound if bound < math.inf else 10.0
        for name in names:
            others = [update.parameters[name.removeprefix("parameters/")] for update in updates]
            middle = torch.stack(others).quantile(0.5, dim=0)
            tensors[name] = middle - most * (tensors[name] - middle)
        tensors = _scaled_curvature(tensors, most**2)  # of which the merge takes the root
    else:
        tensors = ATTACKS[attack](tensors)
    if attack == "samples":
        header = dataclasses.replace(header, num_samples=_MANY * header.num_samples)
    return ClientUpdate(header, tensors, "the hostile client")


def run_attacks(
    federation: Federation,
    clients: Sequence[Client],
    images: ImageData,
    settings: Sequence[tuple[str, ...]],
) -> Iterator[Row]:
    """Merges one federation under each attack with each cap, and tests the models.

    Args:
        federation: what the clients were trained as.
        clients: trained networks and their samples.
        images: the data set, for its test set.
        settings: attacks and names of caps.

    Yields:
        A result for each setting.
    """
    updates = [default_update(client)[0] for client in clients]
    for attack, name in settings:
        bound = BOUNDS[name]
        method = dataclasses.replace(METHODS["fedfisher"], max_influence=bound)
        sent = updates if attack == NOBODY else [*updates, forge(updates, attack, bound)]
        network = initial_network(federation, images)
        merge(method, sent, network, None, QUIET)
        scores = scores_of(network, images)
        yield Row(*astuple(federation), attack, name, *scores)


def make_parser() -> ArgumentParser:
    """Describes the command line.

    Returns:
        The parser.
    """
    return study_parser("hostile_study", __doc__, FEDERATIONS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study from the command line.

    Args:
        arguments: of the command line; None reads `sys.argv`.
    """
    flags = make_parser().parse_args(arguments)
    warnings.filterwarnings("ignore", message="(?s).*median client")
    settings = [(attack, bound) for attack in (NOBODY, *ATTACKS, SHREWD) for bound in BOUNDS]
    run_study(flags, FEDERATIONS, settings, Row, run_attacks)


if __name__ == "__main__":
    main()
