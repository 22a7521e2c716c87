"""Which curvature is worth sending: merged accuracy against kind, Fisher type, samples and bytes.

Trains the clients of several federations once (and keeps them), extracts every setting of a grid
from them, merges each with the default method, and writes one row for each federation and setting.
Started again, it goes on where it was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

from lightning.pytorch import Trainer
from simulation.clients import QUIET
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

from lightning_fedfisher import ClientUpdate, FisherMergeModule


@dataclass(frozen=True)
class Setting:
    """What the clients extract: from so many samples of each, ``all`` or ``auto``."""

    curvature: str
    fisher: str
    samples: str

    @property
    def max_samples(self) -> int | str | None:
        """As the extraction takes it."""
        if self.samples == "auto":
            return self.samples
        return None if self.samples == "all" else int(self.samples)


@dataclass(frozen=True)
class Row(Cell):
    """A result; accuracies in percent, seconds and bytes the mean of the clients."""

    curvature: str
    fisher: str
    samples: str
    accuracy: float
    nll: float
    extraction_seconds: float
    upload_bytes: float
    fedavg_bytes: float


# Development cells, and further ones that no choice was made on.
CELLS = {
    "development": [
        Cell("fashionmnist", "lenet", 0.1, 3, 0),
        Cell("fashionmnist", "lenet", 0.1, 4, 0),
        Cell("fashionmnist", "lenet", 0.1, 5, 0),
        Cell("fashionmnist", "lenet", 0.3, 3, 0),
        Cell("fashionmnist", "lenet", 0.05, 4, 0),
        Cell("fashionmnist", "lenet", 0.07, 11, 7),
        Cell("imagefolder", "cnn", 0.1, 3, 0),
    ],
    "held-out": [
        Cell("fashionmnist", "lenet", 0.1, 30, 1),
        Cell("fashionmnist", "lenet", 0.2, 31, 1),
        Cell("fashionmnist", "lenet", 0.05, 32, 1),
        Cell("imagefolder", "cnn", 0.3, 30, 1),
    ],
}
_SAMPLES = ("64", "125", "250", "500", "1000", "2000", "auto", "all")
_TYPES = ("normalised", "exact", "mc", "empirical")
SETTINGS = [
    *(Setting("kfac", "normalised", n) for n in _SAMPLES if n != "1000"),
    *(Setting(c, f, "1000") for c in ("kfac", "ekfac", "diagonal") for f in _TYPES),
]


def run_settings(
    cell: Cell,
    clients: Sequence[Client],
    images: ImageData,
    settings: Sequence[tuple[str, ...]],
) -> Iterator[Row]:
    """Extracts, merges and tests one setting after the other.

    Args:
        cell: the federation.
        clients: trained networks and samples.
        images: the data, for the test set.
        settings: what to extract, as the fields of `Setting`.

    Yields:
        The results.
    """
    for setting in (Setting(*columns) for columns in settings):
        updates, seconds = [], []
        for client in clients:
            kind, fisher = setting.curvature, setting.fisher
            extracted = extract(client, [kind], fisher, setting.max_samples)[kind]
            seconds.append(extracted.seconds)
            updates.append(ClientUpdate.from_model(client[0], extracted.header(), extracted.blocks))
        network = initial_network(cell, images)
        Trainer(max_epochs=-1, **QUIET).fit(FisherMergeModule(updates, model=network))
        accuracy, nll = scores_of(network, images)
        sent = [_bytes(update) for update in updates]
        yield Row(
            *astuple(cell),
            *astuple(setting),
            accuracy,
            nll,
            sum(seconds) / len(seconds),
            sum(sent) / len(sent),
            updates[0].fedavg_bytes,
        )


def _bytes(update: ClientUpdate) -> int:
    """Of the tensors that would be sent."""
    blocks = [tensor for block in update.blocks.values() for tensor in block.tensors().values()]
    return update.fedavg_bytes + sum(t.numel() * t.element_size() for t in blocks)


def main() -> None:
    """Runs the study from the command line."""
    flags = study_parser("curvature_study", __doc__, CELLS).parse_args()
    settings = [astuple(setting) for setting in SETTINGS]
    run_study(flags, CELLS, settings, Row, run_settings)


if __name__ == "__main__":
    main()
