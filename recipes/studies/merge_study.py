"""Studies which merge is best: every method on the same clients, beside clients and ensemble.

Trains the clients of several federations once (and keeps them), extracts what the methods need from
all of their samples, and writes one row for each federation and method. Started again, it goes on
where it was interrupted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import torch
from jsonargparse import ArgumentParser
from simulation.clients import (
    EXTRACTIONS,
    QUIET,
    Classifier,
    labelled_samples,
    merge,
    predict,
)
from simulation.data import ImageData
from simulation.federations import MERGE_FEDERATIONS, Federation
from simulation.scores import ensemble, score
from simulation.study import (
    Client,
    extract,
    initial_network,
    make_update,
    run_study,
    scores_of,
    study_parser,
)
from tqdm import tqdm

from lightning_fedfisher import ClientUpdate
from lightning_fedfisher.merge.methods import METHODS, MergeMethod

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row(Federation):
    """A result: accuracy in percent, seconds from updates in memory to the model."""

    method: str
    accuracy: float
    nll: float
    server_labels: int
    server_seconds: float


@dataclass(frozen=True)
class Merge:
    """How the updates of one row are merged.

    Attributes:
        base: name of the method.
        extraction: kind of curvature and Fisher type of the updates.
        changes: fields of the method to replace, by name.
    """

    base: str
    extraction: tuple[str, str]
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str | MergeMethod:
        """The method as the merge takes it: a name, or a row of its own."""
        own = f"{self.base}, changed"
        return replace(METHODS[self.base], name=own, **self.changes) if self.changes else self.base


def _variant(**changes: Any) -> Merge:
    """The default method with other values of some of its fields."""
    return Merge("fedfisher", EXTRACTIONS["fedfisher"], changes)


VARIANTS = {
    **{
        f"fedfisher, power {power:g}": _variant(power=power, inputs_power=None)
        for power in (0.25, 0.35, 0.65, 1.0)
    },
    "fedfisher, head as any layer": _variant(output_transform=None),
    **{
        f"fedfisher, shares to the power {power:g}": _variant(client_weight_power=power)
        for power in (1.0, 0.75, 0.25, 0.0)
    },
    "fedfisher, not aligned": _variant(aligns=False, inputs_power=None, linear_damping=1.0),
    "fedfisher, as before": _variant(
        output_transform=None,
        client_weight_power=1.0,
        aligns=False,
        inputs_power=None,
        damping=0.0,
    ),
    "fedfisher, exact Fisher": Merge("fedfisher", ("kfac", "exact")),
    "fedfisher, diagonal": Merge("fedfisher", ("diagonal", "normalised")),
}
"""Variants of the default method, each with one choice made otherwise.

``as before`` treats the output layer like any other, weighs clients by their samples, and aligns no
layer: the default of an earlier version.
"""

# What a merge is measured against.
BEST_CLIENT, ENSEMBLE = "best client", "ensemble"
MERGES: dict[str, Merge] = {
    **{name: Merge(name, extraction) for name, extraction in EXTRACTIONS.items()},
    **VARIANTS,
}


def extract_updates(
    clients: Sequence[Client], extractions: Collection[tuple[str, str]]
) -> dict[tuple[str, str], list[ClientUpdate]]:
    """Extracts what the clients would send, from all of their samples.

    Args:
        clients: trained networks and their samples.
        extractions: kinds of curvature and Fisher types; each Fisher type takes one data pass.

    Returns:
        An update of each client, for each extraction.
    """
    updates: dict[tuple[str, str], list[ClientUpdate]] = {wanted: [] for wanted in extractions}
    for client in tqdm(clients, desc="extract", leave=False, disable=None):
        for fisher in sorted({fisher for _, fisher in extractions}):
            kinds = [kind for kind, of in extractions if of == fisher]
            for kind, extracted in extract(client, kinds, fisher, None).items():
                updates[kind, fisher].append(make_update(client, extracted))
    return updates


def score_clients(clients: Sequence[Client], images: ImageData) -> dict[str, tuple[float, float]]:
    """Tests what there is without a merge: the best client and the ensemble of all.

    Args:
        clients: trained networks.
        images: the data set, for its test set.

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
    federation: Federation,
    clients: Sequence[Client],
    images: ImageData,
    settings: Sequence[tuple[str, ...]],
) -> Iterator[Row]:
    """Merges the same updates with one method after the other, and tests the models.

    Args:
        federation: what the clients were trained as.
        clients: trained networks and their samples.
        images: the data set, for labelled samples and the test set.
        settings: names of methods.

    Yields:
        A result for each setting.
    """
    names = [name for (name,) in settings]
    if {BEST_CLIENT, ENSEMBLE} & set(names):
        for name, scores in score_clients(clients, images).items():
            if name in names:
                yield Row(*astuple(federation), name, *scores, 0, 0.0)
    merges = {name: MERGES[name] for name in names if name in MERGES}
    updates = extract_updates(clients, {how.extraction for how in merges.values()})
    labelled = labelled_samples(images.train, federation.seed)
    for name, how in merges.items():
        network = initial_network(federation, images)
        merged = merge(how.method, updates[how.extraction], network, labelled, QUIET)
        scores = scores_of(network, images)
        yield Row(*astuple(federation), name, *scores, merged.labels, merged.seconds)


def make_parser() -> ArgumentParser:
    """Describes the command line.

    Returns:
        The parser.
    """
    parser = study_parser("merge_study", __doc__, MERGE_FEDERATIONS)
    parser.add_argument(
        "--variants", action="store_true", help="add variants of the default method"
    )
    parser.add_argument(
        "--methods",
        type=str,
        nargs="+",
        choices=tuple(EXTRACTIONS),
        default=list(EXTRACTIONS),
        help="merge methods to compare",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study from the command line.

    Args:
        arguments: of the command line; None reads `sys.argv`.
    """
    flags = make_parser().parse_args(arguments)
    names = [BEST_CLIENT, ENSEMBLE, *flags.methods, *(VARIANTS if flags.variants else ())]
    run_study(flags, MERGE_FEDERATIONS, [(name,) for name in names], Row, run_methods)


if __name__ == "__main__":
    main()
