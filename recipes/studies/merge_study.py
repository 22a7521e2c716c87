"""Which merge is best: every method on the same clients, beside the clients and their ensemble.

Trains the clients of several federations once (and keeps them), extracts what the methods need from
all of their samples, and writes one row for each federation and method. Started again, it goes on
where it was interrupted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from simulation.clients import (
    EXTRACTIONS,
    QUIET,
    Classifier,
    ensemble,
    labelled_samples,
    merge,
    predict,
    score,
)
from simulation.data import ImageData
from simulation.study import (
    Cell,
    Client,
    extract,
    initial_network,
    run_study,
    scores_of,
    study_parser,
)
from tqdm import tqdm

from lightning_fedfisher import METHODS, ClientUpdate
from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.merge.methods import MergeMethod, MethodName

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row(Cell):
    """A result; accuracy in percent, seconds from updates in memory to the model."""

    method: str
    accuracy: float
    nll: float
    server_labels: int
    server_seconds: float


@dataclass(frozen=True)
class Merge:
    """How a row is merged.

    Attributes:
        base: name of the method.
        extraction: curvature and Fisher type of the updates.
        changes: fields of the method that are different here.
    """

    base: MethodName
    extraction: tuple[str, str]
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> MethodName | MergeMethod:
        """As the merge takes it."""
        return replace(METHODS[self.base], **self.changes) if self.changes else self.base


def temper(curvature: Curvature, head: bool, *, power: float, average_head: bool) -> Curvature:
    """The default method's transform, with what was chosen in it open.

    Args:
        curvature: of one client.
        head: whether the layer is the classifier head.
        power: of the spectrum.
        average_head: average the head's curvature over the inputs first.

    Returns:
        The curvature to merge.
    """
    return (curvature.over_outputs() if head and average_head else curvature).power(power)


def _variant(**changes: Any) -> Merge:
    return Merge("fedfisher", EXTRACTIONS["fedfisher"], changes)


_ANY_LAYER = partial(temper, power=0.5, average_head=False)
VARIANTS = {
    **{
        f"fedfisher, power {power:g}": _variant(
            transform=partial(temper, power=power, average_head=True)
        )
        for power in (0.25, 0.35, 0.65, 1.0)
    },
    "fedfisher, head as any layer": _variant(transform=_ANY_LAYER),
    **{
        f"fedfisher, shares to the power {power:g}": _variant(share_power=power)
        for power in (1.0, 0.75, 0.25, 0.0)
    },
    "fedfisher, not aligned": _variant(aligns=False),
    "fedfisher, as before": _variant(transform=_ANY_LAYER, share_power=1.0, aligns=False),
    "fedfisher, exact Fisher": Merge("fedfisher", ("kfac", "exact")),
    "fedfisher, diagonal": Merge("fedfisher", ("diagonal", "normalised")),
}
"""The default method with one choice made otherwise; ``as before``: with head, shares and inputs as
they once were."""

# What a merge is measured against.
BEST_CLIENT, ENSEMBLE = "best client", "ensemble"
MERGES: dict[str, Merge] = {
    **{name: Merge(name, EXTRACTIONS[name]) for name in METHODS},
    **VARIANTS,
}

# Development cells, training seeds of three of their splits, cells held out from an earlier form of
# the default, and cells that no choice was made on.
_ALPHAS = (0.1, 0.2, 0.05, 0.3, 0.05, 0.1, 0.2, 0.3)
CELLS = {
    "development": [
        *(
            Cell("fashionmnist", "lenet", alpha, split, 0)
            for alpha in (0.05, 0.1, 0.2, 0.3)
            for split in range(3, 8)
        ),
        Cell("imagefolder", "cnn", 0.1, 3, 0),
    ],
    "seeds": [
        Cell("fashionmnist", "lenet", alpha, 3, seed)
        for alpha in (0.05, 0.1, 0.2)
        for seed in range(3)
    ],
    "earlier": [
        *(Cell("fashionmnist", "lenet", a, p, 1) for p, a in enumerate(_ALPHAS, start=30)),
        Cell("imagefolder", "cnn", 0.3, 30, 1),
        Cell("imagefolder", "cnn", 0.05, 31, 1),
    ],
    "held-out": [
        *(Cell("fashionmnist", "lenet", a, p, 1) for p, a in enumerate(_ALPHAS, start=38)),
        Cell("imagefolder", "cnn", 0.2, 32, 1),
    ],
}


def extract_updates(
    clients: Sequence[Client], extractions: Collection[tuple[str, str]]
) -> dict[tuple[str, str], list[ClientUpdate]]:
    """What the clients would send, from all of their samples; one pass for each Fisher type.

    Args:
        clients: trained networks and samples.
        extractions: curvatures and Fisher types.

    Returns:
        An update of each client, for each extraction.
    """
    updates: dict[tuple[str, str], list[ClientUpdate]] = {wanted: [] for wanted in extractions}
    for client in tqdm(clients, desc="extract", leave=False, disable=None):
        for fisher in sorted({fisher for _, fisher in extractions}):
            kinds = [kind for kind, of in extractions if of == fisher]
            for kind, extracted in extract(client, kinds, fisher, None).items():
                update = ClientUpdate.from_model(client[0], extracted.header(), extracted.blocks)
                updates[kind, fisher].append(update)
    return updates


def score_clients(clients: Sequence[Client], images: ImageData) -> dict[str, tuple[float, float]]:
    """What is to be had without a merge.

    Args:
        clients: trained networks.
        images: the data, for the test set.

    Returns:
        Accuracy and negative log-likelihood of the best client's model and of the ensemble.
    """
    labels = images.test.labels
    predicted = [predict(Classifier(network, 0.0), images.test, _CPU) for network, _ in clients]
    return {
        BEST_CLIENT: max((score(own, labels) for own in predicted), key=lambda scores: scores[0]),
        ENSEMBLE: score(ensemble(predicted), labels),
    }


def run_methods(
    cell: Cell,
    clients: Sequence[Client],
    images: ImageData,
    settings: Sequence[tuple[str, ...]],
) -> Iterator[Row]:
    """Merges the same updates with one method after the other, and tests the models.

    Args:
        cell: the federation.
        clients: trained networks and samples.
        images: the data, for labelled samples and the test set.
        settings: names of methods.

    Yields:
        The results.
    """
    names = [name for (name,) in settings]
    if {BEST_CLIENT, ENSEMBLE} & set(names):
        for name, scores in score_clients(clients, images).items():
            if name in names:
                yield Row(*astuple(cell), name, *scores, 0, 0.0)
    merges = {name: MERGES[name] for name in names if name in MERGES}
    updates = extract_updates(clients, {how.extraction for how in merges.values()})
    labelled = labelled_samples(images.train, cell.seed)
    for name, how in merges.items():
        network = initial_network(cell, images)
        merged = merge(how.method, updates[how.extraction], network, labelled, QUIET)
        scores = scores_of(network, images)
        yield Row(*astuple(cell), name, *scores, merged.labels, merged.seconds)


def main() -> None:
    """Runs the study from the command line."""
    parser = study_parser("merge_study", __doc__, CELLS)
    parser.add_argument(
        "--variants", action="store_true", help="add variants of the default method"
    )
    flags = parser.parse_args()
    names = [BEST_CLIENT, ENSEMBLE, *METHODS, *(VARIANTS if flags.variants else ())]
    run_study(flags, CELLS, [(name,) for name in names], Row, run_methods)


if __name__ == "__main__":
    main()
