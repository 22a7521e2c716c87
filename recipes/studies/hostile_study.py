"""What one hostile client does to a merge, by what a client may weigh.

To the five clients of several federations a sixth is added who forges its update, and all are
merged by default with several bounds (see `lightning_fedfisher.merge.influence_cap`).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass

import torch
from simulation.clients import QUIET, merge
from simulation.data import ImageData
from simulation.study import (
    Cell,
    Client,
    default_update,
    initial_network,
    run_study,
    scores_of,
    study_parser,
)
from torch import Tensor

from lightning_fedfisher import METHODS, ClientUpdate
from lightning_fedfisher.update.header import UpdateHeader

_MUCH, _MANY = 1e8, 10**6
BOUNDS = {"none": math.inf, "10": 10.0, "3": 3.0, "2": 2.0}
CELLS = {
    "development": [
        *(Cell("fashionmnist", "lenet", 0.1, 3, seed) for seed in range(3)),
        *(Cell("fashionmnist", "lenet", 0.05, 3, seed) for seed in range(3)),
        Cell("imagefolder", "cnn", 0.1, 3, 0),
    ]
}
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Row(Cell):
    """A result; accuracy in percent."""

    attack: str
    bound: str
    accuracy: float
    nll: float


def _curvature(tensors: Tensors, much: float) -> Tensors:
    """Scales every layer's curvature, by one of its factors."""
    return {n: t * much if n.endswith("/row_factor") else t for n, t in tensors.items()}


def _weights(tensors: Tensors, change: Callable[[str, Tensor], Tensor]) -> Tensors:
    return {n: change(n, t) if n.startswith("parameters/") else t for n, t in tensors.items()}


def _noise(name: str, weights: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(len(name))
    return 100 * weights.std() * torch.randn(weights.shape, generator=generator)


def _flat(tensors: Tensors) -> Tensors:
    return {
        n: 1e4 * torch.eye(len(t)) if n.startswith("curvature/") else t for n, t in tensors.items()
    }


def _opposite(name: str, weights: Tensor) -> Tensor:
    return -weights


ATTACKS: Mapping[str, Callable[[Tensors], Tensors]] = {
    "samples": lambda tensors: tensors,
    "curvature": lambda tensors: _curvature(tensors, _MUCH),
    "opposite weights, curvature": lambda t: _curvature(_weights(t, _opposite), _MUCH),
    "noise for weights": lambda tensors: _weights(tensors, _noise),
    "noise for weights, curvature": lambda t: _curvature(_weights(t, _noise), _MUCH),
    "opposite weights, flat curvature": lambda t: _flat(_weights(t, _opposite)),
}
"""What the sixth client makes of a copy of the first one's update.

Curvature is scaled by 1e8, and the number of samples, of which the merge takes the root, by 1e6.
"""

SHREWD, NOBODY = "just within the bound", "none"


def forge(updates: Sequence[ClientUpdate], attack: str, bound: float) -> ClientUpdate:
    """The sixth client's update.

    Args:
        updates: of the others; the first is forged.
        attack: a key of `ATTACKS`, or the one that knows the bound and the others' updates: weights
            on the other side of the median, and curvature, as far as is allowed.
        bound: on what a client may weigh; 10 is taken for none.

    Returns:
        The update.
    """
    first = updates[0]
    names = [*(f"parameters/{name}" for name in first.parameters)]
    tensors = {f"parameters/{name}": tensor for name, tensor in first.parameters.items()}
    for name, block in first.blocks.items():
        tensors |= {f"curvature/{name}/{part}": t for part, t in block.tensors().items()}
    header: UpdateHeader = dataclasses.replace(first.header, quantized={})
    if attack == SHREWD:
        most = bound if bound < math.inf else 10.0
        for name in names:
            others = [update.parameters[name.removeprefix("parameters/")] for update in updates]
            middle = torch.stack(others).quantile(0.5, dim=0)
            tensors[name] = middle - most * (tensors[name] - middle)
        tensors = _curvature(tensors, most**2)  # of which the merge takes the root
    else:
        tensors = ATTACKS[attack](tensors)
    if attack == "samples":
        header = dataclasses.replace(header, num_samples=_MANY * header.num_samples)
    return ClientUpdate(header, tensors, "the hostile client")


def run_attacks(
    cell: Cell,
    clients: Sequence[Client],
    images: ImageData,
    settings: Sequence[tuple[str, ...]],
) -> Iterator[Row]:
    """Merges one federation under each attack with each bound, and tests the models.

    Args:
        cell: the federation.
        clients: trained networks and samples.
        images: the data, for the test set.
        settings: attacks and bounds.

    Yields:
        The results.
    """
    updates = [default_update(client)[0] for client in clients]
    for attack, name in settings:
        bound = BOUNDS[name]
        method = dataclasses.replace(METHODS["fedfisher"], max_influence=bound)
        sent = updates if attack == NOBODY else [*updates, forge(updates, attack, bound)]
        network = initial_network(cell, images)
        merge(method, sent, network, None, QUIET)
        scores = scores_of(network, images)
        yield Row(*astuple(cell), attack, name, *scores)


def main() -> None:
    """Runs the study from the command line."""
    flags = study_parser("hostile_study", __doc__, CELLS).parse_args()
    warnings.filterwarnings("ignore", message="(?s).*median client")
    settings = [(attack, bound) for attack in (NOBODY, *ATTACKS, SHREWD) for bound in BOUNDS]
    run_study(flags, CELLS, settings, Row, run_attacks)


if __name__ == "__main__":
    main()
