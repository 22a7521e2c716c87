"""What the studies share: federations trained once, and a table that grows row by row."""

from __future__ import annotations

import csv
import logging
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from jsonargparse import ArgumentParser
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lightning_fedfisher import ClientUpdate
from lightning_fedfisher._utils.files import atomic_write
from lightning_fedfisher.extraction.extract import ExtractedCurvature, extract_curvatures
from lightning_fedfisher.extraction.layer_report import CurvatureType
from lightning_fedfisher.extraction.positions import Positions
from simulation.clients import (
    QUIET,
    Classifier,
    ClientFolder,
    fit_client,
    predict,
)
from simulation.data import ImageData, TensorImages, collate_images, load_images
from simulation.environment import environment
from simulation.federations import Federation
from simulation.models import build_model
from simulation.partition import reference_partition
from simulation.rows import read_rows
from simulation.scores import score

Client: TypeAlias = tuple[nn.Module, TensorImages]
"""A trained network and the samples it was trained on."""

_CLIENTS = 5  # as in the paper
_EPOCHS = {
    "lenet": 30,
    "cnn": 10,
    "resnet18": 6,
    "resnet8_batchnorm": 20,
    "resnet8_groupnorm": 20,
    "torchvision_resnet18": 10,
    "vit": 60,
}
_MOST_IMAGES = {"resnet18": 4000}  # a CPU trains on so many within minutes
_EXTRACTION_BATCH = 250


MakeRows: TypeAlias = Callable[
    [Federation, Sequence[Client], ImageData, Sequence[tuple[str, ...]]], Iterator[Federation]
]
"""Makes a study's rows of one federation, one for each setting, in the order of the settings.

It takes the federation, its trained clients, the data set and the settings. A row is a dataclass
that adds columns to those of `Federation`.
"""


def initial_network(federation: Federation, images: ImageData) -> nn.Module:
    """Builds the network that all clients of a federation start from.

    Args:
        federation: names the network and the seed.
        images: the data set, for the shape of its images and the number of its classes.

    Returns:
        The untrained network, with the same weights at every call.
    """
    with torch.random.fork_rng():
        torch.manual_seed(federation.seed)
        return build_model(federation.model, *images.train.images.shape[1:3], images.classes)


def fit_federation(federation: Federation, images: ImageData, folder: Path) -> Iterator[Client]:
    """Trains the clients of a federation, or loads those that were trained before.

    Args:
        federation: what to train.
        images: its data set.
        folder: where the trained networks are kept.

    Yields:
        One client after the other.
    """
    train = images.train
    if len(train) > (most := _MOST_IMAGES.get(federation.model, len(train))):
        train = train.subset(
            np.random.default_rng(federation.partition_seed).permutation(len(train))[:most]
        )
    parts = reference_partition(
        train.labels.numpy(), _CLIENTS, federation.alpha, federation.partition_seed
    )
    for index, part in enumerate(parts):
        network = initial_network(federation, images)
        file = folder / f"client-{index}.safetensors"
        samples = train.subset(part)
        if not file.is_file():
            print(f"{federation.name}: training client {index} on {len(part)} samples", flush=True)
            fit_client(
                network,
                samples,
                ClientFolder(folder, index),
                [],
                epochs=_EPOCHS[federation.model],
                learning_rate=0.01,
                batch_size=64,
                curvature_samples=None,
                upload_budget=None,
                seed=1000 * federation.seed + index,
                trainer_options=QUIET,
            )
            with atomic_write(file) as partial:
                save_file(network.state_dict(), partial)
        network.load_state_dict(load_file(file))
        yield network, samples


def extract(
    client: Client,
    kinds: Sequence[str],
    fisher: str,
    max_samples: int | str | None,
    positions: Positions = "auto",
) -> dict[str, ExtractedCurvature]:
    """Extracts curvature from a client's samples, without augmentation and in one pass.

    Args:
        client: network and samples; the network is left in training mode.
        kinds: kinds of curvature, for example ``kfac``.
        fisher: Fisher type, for example ``normalised``.
        max_samples: as `extract_curvatures` takes it.
        positions: as `extract_curvatures` takes it.

    Returns:
        What was extracted, by kind of curvature.
    """
    network, samples = client
    network.train()  # as training leaves it: an evaluation may have come between
    plain = samples.without_augmentation()
    loader = DataLoader(plain, batch_size=_EXTRACTION_BATCH, collate_fn=collate_images)
    extracted = extract_curvatures(
        network,
        loader,
        cast(Sequence[CurvatureType], kinds),
        fisher=cast(Any, fisher),
        max_samples=cast(Any, max_samples),
        positions=positions,
        estimate_statistics=True,
        progress=False,
    )
    return {str(kind): found for kind, found in extracted.items()}


def default_update(client: Client, positions: Positions = "auto") -> tuple[ClientUpdate, float]:
    """Makes the update that the callback's defaults give, but for compression.

    Args:
        client: network and samples.
        positions: of each sample, where others than by default.

    Returns:
        The update, and the seconds that its extraction took.
    """
    extracted = extract(client, ["kfac"], "normalised", "auto", positions)["kfac"]
    return make_update(client, extracted), extracted.seconds


def make_update(client: Client, extracted: ExtractedCurvature) -> ClientUpdate:
    """Makes the update of a client from what was extracted.

    Args:
        client: network and samples.
        extracted: its curvature and running statistics.
    """
    header, blocks, statistics = extracted.header(), extracted.blocks, extracted.statistics
    return ClientUpdate.from_model(client[0], header, blocks, statistics)


def scores_of(network: nn.Module, images: ImageData) -> tuple[float, float]:
    """Tests a network on the whole test set.

    Args:
        network: maps images to logits; left in eval mode.
        images: the data set.

    Returns:
        Accuracy in percent, and the mean negative log-likelihood in nats.
    """
    predicted = predict(Classifier(network, 0.0), images.test, torch.device("cpu"))
    return score(predicted, images.test.labels)


class Table:
    """A CSV file of results, whose first line is a comment with date and hardware."""

    def __init__(self, path: Path, row: type[Federation]) -> None:
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

    def has(self, federation: Federation, setting: tuple[str, ...]) -> bool:
        """Tells whether the table held a row of this federation and setting when it was opened.

        Args:
            federation: the first columns of the row.
            setting: the columns that follow.

        Returns:
            True if there was such a row.
        """
        key = (*map(str, astuple(federation)), *setting)
        return any(row[: len(key)] == key for row in self._rows)

    def append(self, row: Federation) -> None:
        """Writes a row to the end of the file.

        Args:
            row: of the table's own dataclass.
        """
        with self._path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(astuple(row))


def study_parser(
    name: str, text: str | None, federations: Mapping[str, Sequence[Federation]]
) -> ArgumentParser:
    """Describes the command line of a study.

    Args:
        name: of the script, without its suffix.
        text: what the study does, for ``--help``.
        federations: sets of federations to choose from, by name.

    Returns:
        The parser, to which a study may add flags of its own.
    """
    parser = ArgumentParser(prog=f"{name}.py", description=text)
    parser.add_argument(
        "--federations",
        type=str,
        default="development",
        help=f"set of federations: {', '.join(federations)}",
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder of images")
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("runs") / name,
        help="folder for trained clients and results",
    )
    return parser


def run_study(
    flags: Namespace,
    federations: Mapping[str, Sequence[Federation]],
    settings: Sequence[tuple[str, ...]],
    row: type[Federation],
    make_rows: MakeRows,
) -> None:
    """Fills the table of a set of federations; rows that it has are not made again.

    Args:
        flags: parsed by `study_parser`.
        federations: sets of federations, by name.
        settings: what to do with each federation, as the columns that name it.
        row: dataclass of a row: a federation, a setting and results.
        make_rows: makes the rows of one federation.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    chosen = flags.federations
    if chosen not in federations:
        sys.exit(f"error: --federations {chosen} is not one of {', '.join(federations)}")
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    path = flags.output_dir / f"{chosen}.csv"
    try:
        table = Table(path, row)
    except ValueError as error:
        sys.exit(f"error: {error}")
    loaded: dict[str, ImageData] = {}
    for federation in federations[chosen]:
        missing = [setting for setting in settings if not table.has(federation, setting)]
        if not missing:
            continue
        if federation.dataset not in loaded:
            loaded[federation.dataset] = load_images(federation.dataset, flags.data_dir)
        images = loaded[federation.dataset]
        clients = list(fit_federation(federation, images, flags.output_dir / federation.name))
        made = make_rows(federation, clients, images, missing)
        for result in tqdm(made, desc=federation.name, total=len(missing), disable=None):
            table.append(result)
    print(path)
