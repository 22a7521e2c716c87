"""One round of a simulated federation: every client fits, the server merges with every method."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_fedfisher.results.record import ModelScore
from lightning_fedfisher.tracking import federation_logger
from simulation.clients import (
    Classifier,
    ClientFolder,
    ClientResult,
    MergeResult,
    evaluation_device,
    fit_client,
    labelled_samples,
    merge,
    predict,
)
from simulation.data import ImageData
from simulation.flags import Flags
from simulation.initial_weights import weights_digest, without_prefix
from simulation.models import build_model
from simulation.partition import class_histogram, reference_partition, subset
from simulation.scores import assess


@dataclass(frozen=True)
class Merged:
    """The model that one method merged, and its test scores.

    Attributes:
        result: the merged model, and the time that it took.
        score: scores of the merged model on the test set.
    """

    result: MergeResult
    score: ModelScore


class Round:
    """One round of a simulated federation, from the split of the data to the merged models."""

    def __init__(
        self,
        flags: Flags,
        images: ImageData,
        number: int,
        initial_weights: Mapping[str, Tensor] | None,
    ) -> None:
        """Splits the data; trains nothing yet.

        Args:
            flags: from `settle`.
            images: the data set.
            number: of the round, counted from 1.
            initial_weights: state dict of the network that all clients start from; None takes the
                weights that the seed gives.

        Raises:
            ValueError: if a client would be empty.
        """
        self.flags, self.images, self.number = flags, images, number
        self.initial_weights = initial_weights
        self.output = round_folder(flags, number)
        self.report_file = self.output / "results.json"
        self.model_file = self.output / "merged.safetensors"
        self.folders = [ClientFolder(self.output, k) for k in range(flags.clients)]
        chosen = subset(len(images.train), flags.max_train_samples, flags.partition_seed)
        labels = images.train.labels.numpy()[chosen]
        parts = reference_partition(labels, flags.clients, flags.alpha, flags.partition_seed)
        self.histogram = class_histogram(labels, parts, images.classes)
        self.parts = [chosen[part] for part in parts]
        setting = f"a{flags.alpha:g}-p{flags.partition_seed}-s{flags.seed}"
        self.group = f"{flags.dataset}-{flags.model}-{setting}-{round_folder(flags, 1).name}"
        self.device = evaluation_device(flags.accelerator)

    def network(self) -> nn.Module:
        """Builds the network that all clients start from, with the same weights at every call."""
        network = seeded_network(self.flags, self.images)
        if self.initial_weights is not None:
            network.load_state_dict(self.initial_weights)
        return network

    def setting(self) -> dict[str, str]:
        """Names everything that the training of a client depends on.

        Returns:
            Values as text, by name.
        """
        elsewhere = {"methods", "output_dir", "wandb", "accelerator", "devices", "resume"}
        elsewhere |= {"init", "new_head", "rounds"}  # the initial weights count, not their file
        flags = asdict(self.flags).items()
        setting = {name: str(value) for name, value in flags if name not in elsewhere}
        if self.initial_weights is not None:
            setting["initial_weights"] = weights_digest(self.initial_weights)
        if self.number > 1:
            setting["round"] = str(self.number)
        return setting

    def finished(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Loads the results of this round, if an earlier run finished it with the same methods.

        Returns:
            The content of its ``results.json`` and the weights that the next round starts from, or
            None.

        Raises:
            ValueError: if a client was trained under another setting.
        """
        setting = self.setting()
        # Nobody reads the updates of a finished round again: they may be gone.
        clients = [folder.load(setting, methods=[]) for folder in self.folders]
        files = self.report_file, self.model_file
        if any(client is None for client in clients) or not all(map(Path.is_file, files)):
            return None
        report = json.loads(self.report_file.read_text())
        if list(report["methods"]) != self.flags.methods:
            return None
        report.pop("rounds", None)  # of the whole run
        return report, without_prefix(load_file(self.model_file))

    def fit_clients(self) -> tuple[list[ClientResult], list[Tensor]]:
        """Trains every client that is not finished yet.

        Returns:
            Each client's result, and its log-probabilities on the test set.
        """
        flags = self.flags
        setting, main = self.setting(), headline(flags.methods)
        results, predictions = [], []
        for index, (folder, part) in enumerate(zip(self.folders, self.parts, strict=True)):
            title = f"client {index + 1} of {flags.clients}, {len(part)} samples"
            finished = folder.load(setting, flags.methods) if flags.resume else None
            if finished is None:
                say(f"{title}: training {flags.epochs} epochs")
                logger = self._logger(f"client-{index}", f"client-{index}")
                _show_classes(logger, self.histogram[index])
                classifier, seconds, losses = fit_client(
                    self.network(),
                    self.images.train.subset(part),
                    folder,
                    # The first callback logs under the plain names.
                    sorted(flags.methods, key=lambda method: method != main),
                    epochs=int(flags.epochs or 0),
                    learning_rate=flags.learning_rate,
                    batch_size=flags.batch_size,
                    curvature_samples=flags.curvature_samples,
                    upload_budget=flags.upload_budget,
                    seed=1000 * flags.seed + index + 100_000 * (self.number - 1),
                    trainer_options=self._trainer_options(logger),
                )
                predicted = predict(classifier, self.images.test, self.device)
                own = assess(predicted, self.images.test.labels)
                finished = ClientResult(len(part), own.accuracy, seconds, losses), predicted
                if logger:
                    logger.log_metrics(_test_metrics(own))
                _close(logger)
                if is_rank_zero():
                    folder.save(setting, *finished)
            else:
                title += " (kept)"
            say(f"{title}: {finished[0].accuracy:.1f}% of the test set")
            results.append(finished[0])
            predictions.append(finished[1])
        return results, predictions

    def merge(self, method: str, logger: WandbLogger | None) -> Merged:
        """Merges the update files with one method.

        Args:
            method: its name.
            logger: that the merge logs to; None logs nothing.

        Returns:
            The merged model and its score.
        """
        say(f"merging with {method}")
        classifier = Classifier(self.network(), self.flags.learning_rate)
        updates = [folder.update(method) for folder in self.folders]
        labelled = labelled_samples(self.images.train, self.flags.seed)
        result = merge(method, updates, classifier, labelled, self._trainer_options(logger))
        classifier.load_state_dict(result.state_dict)
        score = assess(predict(classifier, self.images.test, self.device), self.images.test.labels)
        if logger:
            costs = {"server_seconds": result.seconds, "server_labels": result.labels}
            logger.log_metrics(_test_metrics(score) | costs)
        return Merged(result, score)

    @contextmanager
    def server_logger(self, method: str) -> Iterator[WandbLogger | None]:
        """Opens a W&B run of the server, and closes it at the end.

        Args:
            method: that the server merges with.

        Yields:
            The logger, or None if nothing is to be logged.
        """
        logger = self._logger(f"server-{method}", method=method)
        try:
            yield logger
        finally:
            _close(logger)

    def _logger(self, name: str, client: str | None = None, **config: str) -> WandbLogger | None:
        """Opens a W&B run of a client or of the server, unless W&B is disabled."""
        if self.flags.wandb == "disabled":
            return None
        tags = [str(self.flags.dataset), str(self.flags.model)]
        if self.flags.rounds > 1:
            config["round"] = str(self.number)
            tags.append(f"round-{self.number}")
        if self.number > 1:
            name += f"-round-{self.number}"
        # Only one run lists all installed packages: that takes as long as the rest of opening it.
        whole = config.get("method") == headline(self.flags.methods)
        return federation_logger(
            self.group,
            client,
            settings=wandb.Settings(x_save_requirements=whole),
            name=name,
            tags=tags,
            config=self.flags.plain() | config,
            mode=self.flags.wandb,
            save_dir=round_folder(self.flags, 1),  # the runs of all rounds side by side
        )

    def _trainer_options(self, logger: WandbLogger | None) -> dict[str, Any]:
        """Options of the Trainers of clients and server."""
        return {
            "accelerator": self.flags.accelerator,
            "devices": self.flags.devices,
            "logger": logger or False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": sys.stdout.isatty(),
        }


def headline(methods: Sequence[str]) -> str:
    """Chooses the method whose model is written, and starts the next round.

    Args:
        methods: merge methods, at least one.

    Returns:
        ``fedfisher`` if it is among them, else the last.
    """
    return "fedfisher" if "fedfisher" in methods else methods[-1]


def round_folder(flags: Flags, number: int) -> Path:
    """Names the folder that a round writes to.

    Args:
        flags: from `settle`.
        number: of the round, counted from 1.

    Returns:
        The output folder for the first round, and a folder in it for every other.
    """
    assert flags.output_dir is not None
    return flags.output_dir if number == 1 else flags.output_dir / f"round-{number}"


def seeded_network(flags: Flags, images: ImageData) -> nn.Module:
    """Builds a network for the data, initialised from the seed.

    Args:
        flags: from `settle`.
        images: the data set.

    Returns:
        The network, with the same weights at every call.
    """
    channels, size = images.train.images.shape[1:3]
    with torch.random.fork_rng():
        torch.manual_seed(flags.seed)
        return build_model(str(flags.model), channels, size, images.classes)


@rank_zero_only
def say(text: str) -> None:
    """Prints a line of progress, on rank 0 alone.

    Args:
        text: of the line.
    """
    Console(highlight=False).print(text, soft_wrap=True, markup=False)


def warn_in_a_line() -> None:
    """Shows each warning in one line, and not those of Lightning that a simulation knows."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*treespec.*", module="lightning")
    warnings.filterwarnings("ignore", ".*have no `val_dataloader`.*")


def is_rank_zero() -> bool:
    """Tells whether this process has rank 0, the one that writes and prints."""
    return rank_zero_only.rank == 0


def _test_metrics(score: ModelScore) -> dict[str, float]:
    """Test scores under the names they are logged by."""
    return {
        "test/accuracy": score.accuracy,
        "test/nll": score.nll,
        "test/calibration_error": score.calibration_error,
    }


def _show_classes(logger: WandbLogger | None, counts: np.ndarray) -> None:
    """Logs how many samples of each class a client holds, which only a simulation may know."""
    if logger is None or not is_rank_zero():
        return
    rows: list[Any] = [[f"class {klass}", int(count)] for klass, count in enumerate(counts)]
    table = wandb.Table(["class", "samples"], rows)
    chart = wandb.plot.bar(table, "class", "samples", title="Samples that the client holds")
    logger.experiment.log({"data/classes": chart})
    logger.experiment.define_metric("train_loss", step_metric="epoch")


def _close(logger: WandbLogger | None) -> None:
    """Ends a W&B run."""
    if logger is not None:
        # Otherwise the next run would go on in this one.
        logger.experiment.finish()
