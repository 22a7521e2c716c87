"""One-shot federated learning, simulated end to end on one machine.

Splits a data set over clients, trains each alone with FedFisherCallback on its Trainer, merges the
update files with every chosen method, and compares the merged models with each other, with the best
single client and with the ensemble of all clients.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_type_hints

import lightning
import numpy as np
import torch
import wandb
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from simulation.data import ImageData, load_images
from simulation.federation import (
    Classifier,
    ClientFolder,
    ClientResult,
    MergeResult,
    ensemble,
    fit_client,
    labelled_samples,
    merge,
    predict,
    score,
)
from simulation.models import build_model
from simulation.partition import class_histogram, reference_partition
from simulation.pictures import draw_accuracies, draw_merge_curves, draw_partition
from torch import Tensor, nn

from lightning_fedfisher import METHODS, ClientUpdate
from lightning_fedfisher.methods import MethodName

DatasetName = Literal[
    "auto", "cifar10", "cifar100", "fashionmnist", "svhn", "gtsrb", "imagefolder", "digits"
]
ModelName = Literal["auto", "lenet", "cnn", "resnet8", "resnet18"]

# The paper's networks; all other data sets take the CNN.
_PAPER_MODELS = {"fashionmnist": "lenet", "cifar100": "resnet18", "gtsrb": "resnet18"}
_PAPER_EPOCHS = 30
# On a CPU, residual networks are sized to finish: epochs, training samples of all clients, and
# samples of each client for its curvature.
_CPU_EPOCHS = {"lenet": 30, "cnn": 10, "resnet8": 10, "resnet18": 1}
_CPU_SAMPLES = {"resnet8": 5000, "resnet18": 2000}
_CPU_CURVATURE_SAMPLES = {"resnet8": 200, "resnet18": 200}
_OUTPUT_VARIABLE = "FEDFISHER_RECIPE_OUTPUT"


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Flags:
    """What the command line takes; every attribute is a flag, with its own help."""

    dataset: DatasetName = _flag("auto", "data set; auto: CIFAR-10 if it can be had, else digits")
    data_dir: Path = _flag(Path("data"), "folder of the data, and of downloads")
    model: ModelName = _flag("auto", "network; auto: the paper's on a GPU, a small one on a CPU")
    clients: int = _flag(5, "number of clients")
    alpha: float = _flag(0.1, "Dirichlet concentration; smaller means more unlike clients")
    partition_seed: int = _flag(3, "seed of the partition")
    seed: int = _flag(0, "seed of the initial weights and of training")
    epochs: int | None = _flag(None, "local epochs; by default what suits model and hardware")
    max_train_samples: int | None = _flag(None, "train on a random subset of this size")
    learning_rate: float = _flag(0.01, "of SGD with momentum 0.9")
    batch_size: int = _flag(64, "of local training")
    curvature_samples: int | None = _flag(None, "samples a client averages its curvature over")
    methods: list[MethodName] = field(
        default_factory=lambda: list(METHODS),
        metadata={"help": "merge methods to compare"},
    )
    output_dir: Path | None = _flag(None, "folder for everything written; a new one by default")
    wandb: Literal["disabled", "offline", "online"] = _flag("offline", "mode of W&B logging")
    accelerator: str = _flag("auto", "Lightning accelerator")
    devices: int = _flag(1, "devices for training and for the merge")
    resume: bool = _flag(False, "go on in --output-dir, keeping its finished clients")


def parse_flags(arguments: Sequence[str] | None = None) -> Flags:
    """Reads the command line and config files.

    Args:
        arguments: of the command line; `sys.argv` if None.

    Returns:
        The flags.
    """
    parser = ArgumentParser(prog="cifar_resnet.py", description=__doc__)
    parser.add_argument("--config", action="config", help="YAML file of flags")
    hints = get_type_hints(Flags)
    defaults = Flags()
    for flag in fields(Flags):
        how: dict[str, Any] = {"type": hints[flag.name], "default": getattr(defaults, flag.name)}
        if hints[flag.name] is bool:
            how = {"action": "store_true"}
        elif flag.name == "methods":
            how |= {"type": MethodName, "nargs": "+"}
        name = "--" + flag.name.replace("_", "-")
        parser.add_argument(name, help=flag.metadata["help"], **how)
    parsed = parser.parse_args(arguments)
    return Flags(**{flag.name: parsed[flag.name] for flag in fields(Flags)})


def settle(flags: Flags, images: ImageData) -> Flags:
    """Replaces what was left open by what suits the data and the hardware.

    Args:
        flags: as given.
        images: the data in hand.

    Returns:
        Flags with dataset, model, epochs, subset and output folder decided.
    """
    on_gpu = torch.cuda.is_available() and flags.accelerator in ("auto", "gpu", "cuda")
    model = flags.model
    if model == "auto":
        paper = _PAPER_MODELS.get(images.name, "cnn")
        model = paper if on_gpu or paper == "lenet" else "resnet8"
    epochs, subset, curvature_samples = (
        flags.epochs,
        flags.max_train_samples,
        flags.curvature_samples,
    )
    if epochs is None:
        epochs = _PAPER_EPOCHS if on_gpu else _CPU_EPOCHS[model]
    if subset is None and not on_gpu:
        subset = _CPU_SAMPLES.get(model)
    if curvature_samples is None and not on_gpu:
        curvature_samples = _CPU_CURVATURE_SAMPLES.get(model)
    if subset is not None and subset >= len(images.train):
        subset = None
    output = flags.output_dir
    if output is None:
        # Processes that Lightning starts for further devices write to the same folder.
        stamp = os.environ.setdefault(
            _OUTPUT_VARIABLE, f"{datetime.now():%Y-%m-%dT%H-%M-%S}-{images.name}-{model}"
        )
        output = Path("runs") / stamp
    return replace(
        flags,
        dataset=images.name,
        model=model,
        epochs=epochs,
        max_train_samples=subset,
        curvature_samples=curvature_samples,
        output_dir=output,
    )


class Federation:
    """One simulated federation, from the split to the table."""

    def __init__(self, flags: Flags, images: ImageData) -> None:
        """Splits the data; trains nothing yet.

        Args:
            flags: settled flags.
            images: the data.

        Raises:
            ValueError: if a client would be empty, or the folder holds another federation.
        """
        assert flags.output_dir is not None
        self.flags, self.images, self.output = flags, images, flags.output_dir
        self.folders = [ClientFolder(self.output, k) for k in range(flags.clients)]
        if not flags.resume and _is_first_process() and (self.output / "clients").exists():
            raise ValueError(
                f"{self.output} already holds finished clients: add --resume to keep them, or "
                "choose another --output-dir"
            )
        chosen = np.arange(len(images.train))
        if flags.max_train_samples is not None:
            random = np.random.default_rng(flags.partition_seed)
            chosen = np.sort(random.choice(chosen, flags.max_train_samples, replace=False))
        labels = images.train.labels.numpy()[chosen]
        parts = reference_partition(labels, flags.clients, flags.alpha, flags.partition_seed)
        self.histogram = class_histogram(labels, parts, images.classes)
        self.parts = [chosen[part] for part in parts]
        setting = f"a{flags.alpha:g}-p{flags.partition_seed}-s{flags.seed}"
        self.group = f"{flags.dataset}-{flags.model}-{setting}-{self.output.name}"
        self.device = torch.device(
            "cuda" if torch.cuda.is_available() and flags.accelerator != "cpu" else "cpu"
        )

    def network(self) -> nn.Module:
        """The weights all clients start from; the same at every call."""
        channels, size = self.images.train.images.shape[1:3]
        with torch.random.fork_rng():
            torch.manual_seed(self.flags.seed)
            return build_model(str(self.flags.model), channels, size, self.images.classes)

    def fit_clients(self) -> tuple[list[ClientResult], list[Tensor]]:
        """Trains every client that is not finished yet.

        Returns:
            Each client's result, and its log-probabilities on the test set.
        """
        flags = self.flags
        not_training = {"methods", "output_dir", "wandb", "accelerator", "devices", "resume"}
        setting = {
            name: str(value) for name, value in asdict(flags).items() if name not in not_training
        }
        results, predictions = [], []
        for index, (folder, part) in enumerate(zip(self.folders, self.parts, strict=True)):
            title = f"client {index + 1} of {flags.clients}, {len(part)} samples"
            finished = folder.load(setting, flags.methods) if flags.resume else None
            if finished is None:
                say(f"{title}: training {flags.epochs} epochs")
                logger = self._logger("client", f"client-{index}")
                classifier, seconds = fit_client(
                    self.network(),
                    self.images.train.subset(part),
                    folder,
                    flags.methods,
                    epochs=int(flags.epochs or 0),
                    learning_rate=flags.learning_rate,
                    batch_size=flags.batch_size,
                    curvature_samples=flags.curvature_samples,
                    seed=1000 * flags.seed + index,
                    trainer_options=self._trainer_options(logger),
                )
                predicted = predict(classifier, self.images.test, self.device)
                accuracy, nll = score(predicted, self.images.test.labels)
                finished = ClientResult(len(part), accuracy, seconds), predicted
                _close(logger, {"test_accuracy": accuracy, "test_nll": nll})
                if _is_first_process():
                    folder.save(setting, *finished)
            else:
                title += " (kept)"
            say(f"{title}: {finished[0].accuracy:.1f}% of the test set")
            results.append(finished[0])
            predictions.append(finished[1])
        return results, predictions

    def merge_all(self) -> dict[str, tuple[MergeResult, float, float]]:
        """Merges the update files with every method.

        Returns:
            For each method the merge, and the merged model's test accuracy and NLL.
        """
        labelled = labelled_samples(self.images.train, self.flags.seed)
        merged = {}
        logger = self._logger("server", "server")
        for method in self.flags.methods:
            say(f"merging with {method}")
            classifier = Classifier(self.network(), self.flags.learning_rate)
            updates = [folder.update(method) for folder in self.folders]
            options = self._trainer_options(logger and self._prefixed(logger, method))
            result = merge(method, updates, classifier, labelled, options)
            classifier.load_state_dict(result.state_dict)
            predicted = predict(classifier, self.images.test, self.device)
            merged[method] = result, *score(predicted, self.images.test.labels)
        _close(logger, {f"{m}/test_accuracy": merged[m][1] for m in merged})
        return merged

    def _logger(self, job: str, name: str) -> WandbLogger | None:
        if self.flags.wandb == "disabled":
            return None
        if not _is_first_process():
            return WandbLogger()  # a dummy outside the first process
        return WandbLogger(
            experiment=wandb.init(
                project="lightning-fedfisher",
                group=self.group,
                job_type=job,
                name=name,
                dir=self.output,
                mode=self.flags.wandb,
                config=_plain(self.flags),
            )
        )

    @staticmethod
    def _prefixed(logger: WandbLogger, prefix: str) -> WandbLogger:
        """A logger into the same run, with names of its own."""
        return WandbLogger(experiment=logger.experiment, prefix=prefix)

    def _trainer_options(self, logger: WandbLogger | None) -> dict[str, Any]:
        return {
            "accelerator": self.flags.accelerator,
            "devices": self.flags.devices,
            "logger": logger or False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": sys.stdout.isatty(),
        }


def report(
    federation: Federation,
    clients: Sequence[ClientResult],
    predictions: Sequence[Tensor],
    merged: Mapping[str, tuple[MergeResult, float, float]],
) -> dict[str, Any]:
    """Puts all numbers together, in the form of ``results.json``.

    Args:
        federation: the federation.
        clients: result of each client.
        predictions: log-probabilities of each client's model on the test set.
        merged: from `Federation.merge_all`.

    Returns:
        The report; accuracies in percent, sizes in bytes a client, times in seconds.
    """
    ensemble_accuracy, ensemble_nll = score(ensemble(predictions), federation.images.test.labels)
    methods = {}
    for method, (result, accuracy, nll) in merged.items():
        files = [folder.update(method) for folder in federation.folders]
        seconds = [client.extraction_seconds[files[0].name] for client in clients]
        methods[method] = {
            "accuracy": accuracy,
            "nll": nll,
            "upload_bytes": round(sum(file.stat().st_size for file in files) / len(files)),
            "fedavg_bytes": ClientUpdate.open(files[0]).fedavg_bytes,
            "client_seconds": sum(seconds) / len(seconds),
            "server_seconds": result.seconds,
            "server_labels": result.labels,
        }
    return {
        "config": _plain(federation.flags),
        "data": federation.images.note,
        "environment": environment(federation.device),
        "clients": [{"num_samples": c.num_samples, "accuracy": c.accuracy} for c in clients],
        "best_client": {"accuracy": max(client.accuracy for client in clients)},
        "ensemble": {"accuracy": ensemble_accuracy, "nll": ensemble_nll},
        "methods": methods,
    }


def environment(device: torch.device) -> dict[str, str]:
    """What the times depend on: date, versions and hardware."""
    processor = f"{os.cpu_count()} cores, {platform.machine()}"
    return {
        "date": f"{datetime.now():%Y-%m-%d}",
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else processor,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }


def write(
    federation: Federation,
    results: Mapping[str, Any],
    merged: Mapping[str, tuple[MergeResult, float, float]],
) -> list[Path]:
    """Writes the report, the merged model and the pictures.

    Args:
        federation: the federation.
        results: from `report`.
        merged: from `Federation.merge_all`.

    Returns:
        What was written.
    """
    output = federation.output
    headline = "fedfisher" if "fedfisher" in merged else list(merged)[-1]
    save_file(merged[headline][0].state_dict, output / "merged.safetensors")
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return [
        output / "results.json",
        output / "merged.safetensors",
        federation.folders[0].updates.parent,
        draw_partition(federation.histogram, output / "partition.png"),
        draw_accuracies(results, output / "accuracy.png"),
        draw_merge_curves(
            {method: result.history for method, (result, _, _) in merged.items()},
            output / "merge.png",
        ),
    ]


def show(results: Mapping[str, Any], console: Console) -> None:
    """Prints the comparison table.

    Args:
        results: from `report`.
        console: where to.
    """
    table = Table(title="Test accuracy of one-shot models")
    table.add_column("model", no_wrap=True)
    for column in ("accuracy", "NLL", "upload", "client", "server", "labels"):
        table.add_column(column, justify="right", no_wrap=True)
    best, together = results["best_client"], results["ensemble"]
    table.add_row("best single client", f"{best['accuracy']:.2f}", *[""] * 5)
    table.add_row("ensemble of clients", f"{together['accuracy']:.2f}", f"{together['nll']:.3f}")
    table.add_section()
    for method, row in results["methods"].items():
        table.add_row(
            method,
            f"{row['accuracy']:.2f}",
            f"{row['nll']:.3f}",
            f"{row['upload_bytes'] / row['fedavg_bytes']:.2f}x",
            f"{row['client_seconds']:.1f} s",
            f"{row['server_seconds']:.1f} s",
            str(row["server_labels"]),
        )
    console.print(table)
    console.print(
        "accuracy in percent; upload: bytes a client sends, in multiples of its weights;\n"
        "client: extraction; server: merge; labels: labelled samples the server used",
        highlight=False,
    )


def run(flags: Flags) -> dict[str, Any]:
    """Runs the whole recipe.

    Args:
        flags: from `parse_flags`.

    Returns:
        The report, as written to ``results.json``.
    """
    if flags.resume and flags.output_dir is None:
        raise ValueError("--resume goes on in a folder: add --output-dir")
    for name in ("clients", "epochs", "max_train_samples", "batch_size", "curvature_samples"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    images = load_images(flags.dataset, flags.data_dir)
    flags = settle(flags, images)
    say(f"data: {images.note}")
    subset = f"{flags.max_train_samples or len(images.train)} of {len(images.train)}"
    say(
        f"{flags.clients} clients share {subset} training samples of {flags.dataset} "
        f"(alpha {flags.alpha:g}, partition seed {flags.partition_seed}); model {flags.model}"
    )
    federation = Federation(flags, images)
    clients, predictions = federation.fit_clients()
    merged = federation.merge_all()
    results = report(federation, clients, predictions, merged)
    if _is_first_process():
        written = write(federation, results, merged)
        console = Console()
        show(results, console)
        console.print("written:")
        for path in written:
            console.print(f"  {path}", soft_wrap=True, highlight=False)
    return results


@rank_zero_only
def say(text: str) -> None:
    """Prints a line of progress, once."""
    Console(highlight=False).print(text, soft_wrap=True, markup=False)


def _plain(flags: Flags) -> dict[str, Any]:
    """The flags in types that JSON and W&B know."""
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in asdict(flags).items()
    }


def _is_first_process() -> bool:
    return rank_zero_only.rank == 0


def _close(logger: WandbLogger | None, metrics: Mapping[str, float]) -> None:
    if logger is not None:
        logger.log_metrics(metrics)
        # Otherwise the next WandbLogger would go on in this run.
        logger.experiment.finish()


def main() -> None:
    """Runs the recipe from the command line."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*treespec.*", module="lightning")
    warnings.filterwarnings("ignore", ".*have no `val_dataloader`.*")
    os.environ.setdefault("WANDB_SILENT", "true")
    flags = parse_flags()
    try:
        run(flags)
    except (OSError, ValueError, MisconfigurationException) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
