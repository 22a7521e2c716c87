"""Studies which curvature is worth sending: merged accuracy by kind, Fisher type and samples.

Trains the clients of several federations once (and keeps them), extracts every setting of a grid
from them, merges each with the default method, and writes one row for each federation and setting.
Started again, it goes on where it was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from simulation.clients import QUIET
from simulation.data import ImageData
from simulation.federations import CURVATURE_FEDERATIONS, Federation
from simulation.study import (
    Client,
    extract,
    initial_network,
    make_update,
    run_study,
    scores_of,
    study_parser,
)

from lightning_fedfisher import ClientUpdate, FisherMergeModule


@dataclass(frozen=True)
class Setting:
    """What each client extracts.

    Attributes:
        curvature: kind of curvature.
        fisher: Fisher type.
        samples: number of samples to average over, ``all`` or ``auto``.
    """

    curvature: str
    fisher: str
    samples: str

    @property
    def max_samples(self) -> int | str | None:
        """The number of samples as the extraction takes it."""
        if self.samples == "auto":
            return self.samples
        return None if self.samples == "all" else int(self.samples)


@dataclass(frozen=True)
class Row(Federation):
    """A result: accuracy in percent; seconds and bytes are means over clients."""

    curvature: str
    fisher: str
    samples: str
    accuracy: float
    nll: float
    extraction_seconds: float
    upload_bytes: float
    fedavg_bytes: float


_SAMPLES = ("64", "125", "250", "500", "1000", "2000", "auto", "all")
_TYPES = ("normalised", "exact", "mc", "empirical")
SETTINGS = [
    *(Setting("kfac", "normalised", n) for n in _SAMPLES if n != "1000"),
    *(Setting(c, f, "1000") for c in ("kfac", "ekfac", "diagonal") for f in _TYPES),
]


def run_settings(
    federation: Federation,
    clients: Sequence[Client],
    images: ImageData,
    settings: Sequence[tuple[str, ...]],
) -> Iterator[Row]:
    """Extracts, merges and tests one setting after the other.

    Args:
        federation: what the clients were trained as.
        clients: trained networks and their samples.
        images: the data set, for its test set.
        settings: what to extract, as the fields of `Setting`.

    Yields:
        A result for each setting.
    """
    for setting in (Setting(*columns) for columns in settings):
        updates, seconds = [], []
        for client in clients:
            kind, fisher = setting.curvature, setting.fisher
            extracted = extract(client, [kind], fisher, setting.max_samples)[kind]
            seconds.append(extracted.seconds)
            updates.append(make_update(client, extracted))
        network = initial_network(federation, images)
        Trainer(max_epochs=-1, **QUIET).fit(FisherMergeModule(updates, model=network))
        accuracy, nll = scores_of(network, images)
        sent = [_bytes(update) for update in updates]
        yield Row(
            *astuple(federation),
            *astuple(setting),
            accuracy,
            nll,
            sum(seconds) / len(seconds),
            sum(sent) / len(sent),
            updates[0].fedavg_bytes,
        )


def _bytes(update: ClientUpdate) -> int:
    """Counts the bytes of the tensors that would be sent."""
    blocks = [tensor for block in update.blocks.values() for tensor in block.tensors().values()]
    return update.fedavg_bytes + sum(t.numel() * t.element_size() for t in blocks)


def make_parser() -> ArgumentParser:
    """Describes the command line.

    Returns:
        The parser.
    """
    return study_parser("curvature_study", __doc__, CURVATURE_FEDERATIONS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study from the command line.

    Args:
        arguments: of the command line; None reads `sys.argv`.
    """
    flags = make_parser().parse_args(arguments)
    settings = [astuple(setting) for setting in SETTINGS]
    run_study(flags, CURVATURE_FEDERATIONS, settings, Row, run_settings)


if __name__ == "__main__":
    main()
