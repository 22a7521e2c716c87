"""Studies what it costs to compute factors from some positions, and to pack them: merged accuracy.

Trains the clients of several federations once (and keeps them), extracts K-FAC of the default
samples from all positions of a sample, from the default sixteenth and from a single one, packs it
by several upload budgets, merges it with the default method, and writes one row for each. Started
again, it goes on where it was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

from jsonargparse import ArgumentParser
from simulation.data import ImageData
from simulation.federations import POSITIONS_FEDERATIONS, Federation
from simulation.study import (
    Client,
    default_update,
    initial_network,
    run_study,
    scores_of,
    study_parser,
)

from lightning_fedfisher import ClientUpdate, merge_updates
from lightning_fedfisher.extraction.positions import Positions

POSITIONS: dict[str, Positions] = {"all": None, "auto": "auto", "1": 1}
BUDGETS: dict[str, float | None] = {
    "as it is": None,
    "budget 1": 1.0,
    "budget 0.3": 0.3,
    "budget 0.25": 0.25,
}
SETTINGS = [(positions, sent) for positions in POSITIONS for sent in BUDGETS]


@dataclass(frozen=True)
class Row(Federation):
    """A result: accuracy in percent; seconds are the mean of a client's extraction."""

    positions: str
    sent: str
    accuracy: float
    nll: float
    extraction_seconds: float


def run_settings(
    federation: Federation,
    clients: Sequence[Client],
    images: ImageData,
    settings: Sequence[tuple[str, ...]],
) -> Iterator[Row]:
    """Extracts, packs, merges and tests one setting after the other.

    Args:
        federation: what the clients were trained as.
        clients: trained networks and their samples.
        images: the data set, for its test set.
        settings: positions and what is sent, as keys of `POSITIONS` and `BUDGETS`.

    Yields:
        A result for each setting.
    """
    extracted: dict[str, tuple[list[ClientUpdate], float]] = {}
    for positions, sent in settings:
        if positions not in extracted:
            extracted[positions] = _extract(clients, POSITIONS[positions])
        updates, seconds = extracted[positions]
        budget = BUDGETS[sent]
        packed = updates if budget is None else [update.compressed(budget) for update in updates]
        network = initial_network(federation, images)
        network.load_state_dict(merge_updates(packed).state_dict, strict=False)
        scores = scores_of(network, images)
        yield Row(*astuple(federation), positions, sent, *scores, seconds)


def _extract(clients: Sequence[Client], positions: Positions) -> tuple[list[ClientUpdate], float]:
    """Makes the clients' updates, and tells the mean seconds that one took."""
    updates, seconds = zip(*(default_update(c, positions) for c in clients), strict=True)
    return list(updates), sum(seconds) / len(clients)


def make_parser() -> ArgumentParser:
    """Describes the command line.

    Returns:
        The parser.
    """
    return study_parser("positions_study", __doc__, POSITIONS_FEDERATIONS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study from the command line.

    Args:
        arguments: of the command line; None reads `sys.argv`.
    """
    flags = make_parser().parse_args(arguments)
    run_study(flags, POSITIONS_FEDERATIONS, SETTINGS, Row, run_settings)


if __name__ == "__main__":
    main()
