"""What the studies share: federations trained once, and a table that grows by a row at a time."""

from __future__ import annotations

import csv
import logging
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from cifar_resnet import environment
from jsonargparse import ArgumentParser
from safetensors.torch import load_file, save_file
from studies.tables import read_rows
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lightning_fedfisher import ClientUpdate
from lightning_fedfisher.extraction.extract import ExtractedCurvature, extract_curvatures
from lightning_fedfisher.extraction.layer_report import CurvatureType
from simulation.clients import (
    QUIET,
    Classifier,
    ClientFolder,
    fit_client,
    predict,
    score,
)
from simulation.data import ImageData, TensorImages, collate_images, load_images
from simulation.models import build_model
from simulation.partition import reference_partition

Client: TypeAlias = tuple[nn.Module, TensorImages]
"""A trained network and the samples it was trained on."""

_EPOCHS = {"lenet": 30, "cnn": 10, "resnet18": 6}
_MOST_IMAGES = {"resnet18": 4000}  # of which a processor trains it within minutes
_EXTRACTION_BATCH = 250


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


Rows: TypeAlias = Callable[
    [Cell, Sequence[Client], ImageData, Sequence[tuple[str, ...]]], Iterator[Cell]
]
"""Makes the rows of a cell for the given settings: cells with further columns, in that order."""


def initial_network(cell: Cell, images: ImageData) -> nn.Module:
    """The network all clients of a cell start from; the same at every call.

    Args:
        cell: the federation.
        images: its data set.

    Returns:
        The untrained network.
    """
    with torch.random.fork_rng():
        torch.manual_seed(cell.seed)
        return build_model(cell.model, *images.train.images.shape[1:3], images.classes)


def fit_cell(cell: Cell, images: ImageData, folder: Path) -> Iterator[Client]:
    """Each client's trained network and its samples, trained if they are not there yet.

    Args:
        cell: the federation.
        images: its data set.
        folder: of the cell.

    Yields:
        One client after the other.
    """
    train = images.train
    if len(train) > (most := _MOST_IMAGES.get(cell.model, len(train))):
        train = train.subset(
            np.random.default_rng(cell.partition_seed).permutation(len(train))[:most]
        )
    labels = train.labels.numpy()
    for index, part in enumerate(reference_partition(labels, 5, cell.alpha, cell.partition_seed)):
        network = initial_network(cell, images)
        file = folder / f"client-{index}.safetensors"
        samples = train.subset(part)
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
                upload_budget=None,
                seed=1000 * cell.seed + index,
                trainer_options=QUIET,
            )
            folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            save_file(network.state_dict(), partial)
            partial.replace(file)
        network.load_state_dict(load_file(file))
        yield network, samples


def extract(
    client: Client, kinds: Sequence[str], fisher: str, max_samples: int | str | None
) -> dict[str, ExtractedCurvature]:
    """Extracts from a client's un-augmented samples, in one pass.

    Args:
        client: network and samples.
        kinds: of curvature.
        fisher: Fisher type.
        max_samples: as `extract_curvatures` takes it.

    Returns:
        What was extracted, by kind.
    """
    network, samples = client
    plain = samples.without_augmentation()
    loader = DataLoader(plain, batch_size=_EXTRACTION_BATCH, collate_fn=collate_images)
    extracted = extract_curvatures(
        network,
        loader,
        cast(Sequence[CurvatureType], kinds),
        fisher=cast(Any, fisher),
        max_samples=cast(Any, max_samples),
        progress=False,
    )
    return {str(kind): found for kind, found in extracted.items()}


def default_update(client: Client) -> tuple[ClientUpdate, float]:
    """What the callback extracts of a client by default, as it is.

    Args:
        client: network and samples.

    Returns:
        The update, and the seconds its extraction took.
    """
    extracted = extract(client, ["kfac"], "normalised", "auto")["kfac"]
    update = ClientUpdate.from_model(client[0], extracted.header(), extracted.blocks)
    return update, extracted.seconds


def scores_of(network: nn.Module, images: ImageData) -> tuple[float, float]:
    """How a network does on the whole test set.

    Args:
        network: left in eval mode.
        images: the data set.

    Returns:
        Accuracy in percent, and negative log-likelihood.
    """
    predicted = predict(Classifier(network, 0.0), images.test, torch.device("cpu"))
    return score(predicted, images.test.labels)


class Table:
    """A CSV file of results, under a comment that tells date and hardware."""

    def __init__(self, path: Path, row: type[Cell]) -> None:
        """Opens the table, or begins it.

        Args:
            path: of the file.
            row: dataclass whose fields are the columns.

        Raises:
            ValueError: if the file holds other columns.
        """
        self._path = path
        columns = ",".join(field.name for field in fields(row))
        if not path.is_file():
            about = ", ".join(environment(torch.device("cpu")).values())
            path.write_text(f"# {about}\n{columns}\n")
        elif columns not in path.read_text().splitlines():
            raise ValueError(f"{path} is of another study: choose another --output-dir")
        self._rows = [tuple(found.values()) for found in read_rows(path)]

    def has(self, cell: Cell, setting: tuple[str, ...]) -> bool:
        """Whether it held a row that begins with these when it was opened."""
        key = (*map(str, astuple(cell)), *setting)
        return any(row[: len(key)] == key for row in self._rows)

    def append(self, row: Cell) -> None:
        """Writes a row."""
        with self._path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(astuple(row))


def study_parser(
    name: str, text: str | None, cells: Mapping[str, Sequence[Cell]]
) -> ArgumentParser:
    """The command line of a study.

    Args:
        name: of the recipe.
        text: what it does.
        cells: sets of cells to choose from, by name.

    Returns:
        The parser; a study may add flags of its own.
    """
    parser = ArgumentParser(prog=f"{name}.py", description=text)
    parser.add_argument("--cells", type=str, default="development", help=" or ".join(cells))
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="of image folders")
    parser.add_argument("--output-dir", type=Path, default=Path("runs") / name)
    return parser


def run_study(
    flags: Namespace,
    cells: Mapping[str, Sequence[Cell]],
    settings: Sequence[tuple[str, ...]],
    row: type[Cell],
    make_rows: Rows,
) -> None:
    """Fills the table of a set of cells; rows it has are not made again.

    Args:
        flags: of `study_parser`.
        cells: sets of cells, by name.
        settings: what to do with each cell: the columns that name it.
        row: dataclass of a row: a cell, a setting and results.
        make_rows: does it.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    if flags.cells not in cells:
        sys.exit(f"error: --cells {flags.cells} is not one of {', '.join(cells)}")
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    path = flags.output_dir / f"{flags.cells}.csv"
    try:
        table = Table(path, row)
    except ValueError as error:
        sys.exit(f"error: {error}")
    loaded: dict[str, ImageData] = {}
    for cell in cells[flags.cells]:
        missing = [setting for setting in settings if not table.has(cell, setting)]
        if not missing:
            continue
        if cell.dataset not in loaded:
            loaded[cell.dataset] = load_images(cell.dataset, flags.data_dir)
        images = loaded[cell.dataset]
        clients = list(fit_cell(cell, images, flags.output_dir / cell.name))
        made = make_rows(cell, clients, images, missing)
        for result in tqdm(made, desc=cell.name, total=len(missing), disable=None):
            table.append(result)
    print(path)
