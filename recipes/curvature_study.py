"""Which curvature is worth sending: merged accuracy against kind, Fisher type, samples and bytes.

Trains the clients of several federations once (and keeps them), extracts every setting of a grid
from them, merges each with the default method, and writes one row for each federation and setting.
Started again, it goes on where it was interrupted.
"""

from __future__ import annotations

import csv
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from cifar_resnet import environment
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from results_table import read_rows
from safetensors.torch import load_file, save_file
from simulation.data import ImageData, TensorImages, collate_images, load_images
from simulation.federation import QUIET, Classifier, ClientFolder, fit_client, predict, score
from simulation.models import build_model
from simulation.partition import reference_partition
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lightning_fedfisher import ClientUpdate, FisherMergeModule, extract_curvatures
from lightning_fedfisher.treatment import CurvatureType

_EPOCHS = {"lenet": 30, "cnn": 10}
_BATCH = 250


@dataclass(frozen=True)
class Cell:
    """One federation: a data set, a network, a split and a training."""

    dataset: str
    model: str
    alpha: float
    partition_seed: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.dataset}-{self.model}-a{self.alpha:g}-p{self.partition_seed}-s{self.seed}"


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
class Row:
    """A result; accuracies in percent, seconds and bytes the mean of the clients."""

    dataset: str
    model: str
    alpha: float
    partition_seed: int
    seed: int
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


def fit_cell(
    cell: Cell, images: ImageData, folder: Path
) -> Iterator[tuple[nn.Module, TensorImages]]:
    """Each client's trained network and its samples, trained if they are not there yet.

    Args:
        cell: the federation.
        images: its data set.
        folder: of the cell.

    Yields:
        One client after the other.
    """
    labels = images.train.labels.numpy()
    for index, part in enumerate(reference_partition(labels, 5, cell.alpha, cell.partition_seed)):
        with torch.random.fork_rng():
            torch.manual_seed(cell.seed)
            network = build_model(cell.model, *images.train.images.shape[1:3], images.classes)
        file = folder / f"client-{index}.safetensors"
        samples = images.train.subset(part)
        if not file.is_file():
            print(f"{cell.name}: training client {index} on {len(part)} samples", flush=True)
            fit_client(
                network,
                samples,
                ClientFolder(folder, index),
                [],
                epochs=_EPOCHS[cell.model],
                learning_rate=0.01,
                batch_size=64,
                curvature_samples=None,
                seed=1000 * cell.seed + index,
                trainer_options=QUIET,
            )
            folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            save_file(network.state_dict(), partial)
            partial.replace(file)
        network.load_state_dict(load_file(file))
        yield network, samples


def run_setting(
    cell: Cell,
    setting: Setting,
    clients: Sequence[tuple[nn.Module, TensorImages]],
    images: ImageData,
) -> Row:
    """Extracts, merges and tests one setting.

    Args:
        cell: the federation.
        setting: what to extract.
        clients: trained networks and samples.
        images: the data, for the test set.

    Returns:
        The result.
    """
    updates, seconds = [], []
    for network, samples in clients:
        plain = samples.without_augmentation()
        loader = DataLoader(plain, batch_size=_BATCH, collate_fn=collate_images)
        kind = cast(CurvatureType, setting.curvature)
        extracted = extract_curvatures(
            network,
            loader,
            [kind],
            fisher=cast(Any, setting.fisher),
            max_samples=cast(Any, setting.max_samples),
            progress=False,
        )[kind]
        seconds.append(extracted.seconds)
        updates.append(ClientUpdate.from_model(network, extracted.header(), extracted.blocks))
    network = build_model(cell.model, *images.train.images.shape[1:3], images.classes)
    module = FisherMergeModule(updates, model=network)
    Trainer(max_epochs=-1, **QUIET).fit(module)
    predicted = predict(Classifier(network, 0.0), images.test, torch.device("cpu"))
    accuracy, nll = score(predicted, images.test.labels)
    sent = [_bytes(update) for update in updates]
    return Row(
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
    parser = ArgumentParser(prog="curvature_study.py", description=__doc__)
    parser.add_argument("--cells", type=str, default="development", help=" or ".join(CELLS))
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="of image folders")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/curvature_study"))
    flags = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    if flags.cells not in CELLS:
        sys.exit(f"error: --cells {flags.cells} is not one of {', '.join(CELLS)}")
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    table = flags.output_dir / f"{flags.cells}.csv"
    done: set[tuple[str, ...]] = set()
    if table.is_file():
        done = {tuple(list(row.values())[:8]) for row in read_rows(table)}
    else:
        about = ", ".join(environment(torch.device("cpu")).values())
        table.write_text(f"# {about}\n" + ",".join(field.name for field in fields(Row)) + "\n")
    loaded: dict[str, ImageData] = {}
    for cell in CELLS[flags.cells]:
        if cell.dataset not in loaded:
            loaded[cell.dataset] = load_images(cell.dataset, flags.data_dir)
        images = loaded[cell.dataset]
        clients = list(fit_cell(cell, images, flags.output_dir / cell.name))
        for setting in tqdm(SETTINGS, desc=cell.name, disable=None):
            if tuple(map(str, (*astuple(cell), *astuple(setting)))) in done:
                continue
            row = run_setting(cell, setting, clients, images)
            with table.open("a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(asdict(row).values())
    print(table)


if __name__ == "__main__":
    main()
