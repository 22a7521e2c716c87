"""The command line of `cifar_resnet.py`, and the defaults that depend on data and hardware."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from jsonargparse import ArgumentParser, Namespace

from simulation.clients import EXTRACTIONS
from simulation.data import ImageData

DatasetName = Literal[
    "auto", "cifar10", "cifar100", "fashionmnist", "svhn", "gtsrb", "imagefolder", "digits"
]
ModelName = Literal[
    "auto",
    "lenet",
    "cnn",
    "resnet8",
    "resnet18",
    "resnet8_batchnorm",
    "resnet8_groupnorm",
    "torchvision_resnet18",
    "vit",
]

# The paper's networks; all other data sets take the CNN.
_PAPER_MODELS = {"fashionmnist": "lenet", "cifar100": "resnet18", "gtsrb": "resnet18"}
_PAPER_EPOCHS = 30
# On a CPU, residual networks are sized to finish: epochs, training samples of all clients, and
# samples of each client for its curvature.
_ON_CPU: dict[str, tuple[int, int | None, int | None]] = {
    "lenet": (30, None, None),
    "cnn": (10, None, None),
    "resnet8": (10, 5000, 200),
    "resnet18": (1, 2000, 200),
    "resnet8_batchnorm": (10, 5000, 200),
    "resnet8_groupnorm": (10, 5000, 200),
    "torchvision_resnet18": (10, 2000, 200),
    "vit": (60, 5000, 200),
}
# Reports say nothing of these flags where they change nothing.
_UNUSED: dict[str, Any] = {"init": None, "new_head": False, "rounds": 1}
_OUTPUT_VARIABLE = "FEDFISHER_RECIPE_OUTPUT"


def _flag(default: Any, text: str) -> Any:
    """A field of `Flags` with its help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Flags:
    """The values of all flags; every attribute is a flag of its name, with its own help."""

    dataset: DatasetName = _flag("auto", "data set; auto: CIFAR-10 if it can be had, else digits")
    data_dir: Path = _flag(Path("data"), "folder of the data, and of downloads")
    model: ModelName = _flag("auto", "network; auto: the paper's on a GPU, a small one on a CPU")
    clients: int = _flag(5, "number of clients")
    alpha: float = _flag(0.1, "Dirichlet concentration; smaller means more unlike clients")
    partition_seed: int = _flag(3, "seed of the partition")
    seed: int = _flag(0, "seed of the initial weights and of training")
    init: Path | None = _flag(None, ".safetensors file of weights to start from, not the seeded")
    new_head: bool = _flag(False, "with --init: keep the seeded weights of the last layer")
    rounds: int = _flag(1, "rounds of fit and merge, each from the model merged in the one before")
    epochs: int | None = _flag(None, "local epochs; by default what suits model and hardware")
    max_train_samples: int | None = _flag(None, "train on a random subset of this size")
    learning_rate: float = _flag(0.01, "learning rate of SGD with momentum 0.9")
    batch_size: int = _flag(64, "batch size of local training")
    curvature_samples: int | None = _flag(None, "samples a client averages its curvature over")
    upload_budget: float = _flag(1.0, "most bytes of an update, in multiples of a FedAvg upload")
    methods: list[str] = field(
        default_factory=lambda: list(EXTRACTIONS),
        metadata={"help": "merge methods to compare"},
    )
    output_dir: Path | None = _flag(None, "folder for everything written; a new one by default")
    wandb: Literal["disabled", "offline", "online"] = _flag("offline", "mode of W&B logging")
    accelerator: str = _flag("auto", "Lightning accelerator")
    devices: int = _flag(1, "devices for training and for the merge")
    resume: bool = _flag(False, "go on in --output-dir, keeping finished clients and rounds")

    def plain(self) -> dict[str, Any]:
        """Gives the flags in types that JSON and W&B know.

        Returns:
            Values by name, without flags that were left out and change nothing.
        """
        return {
            key: str(value) if isinstance(value, Path) else value
            for key, value in asdict(self).items()
            if key not in _UNUSED or value != _UNUSED[key]
        }


def flags_parser(description: str | None = None, script: str = "cifar_resnet.py") -> ArgumentParser:
    """Describes the command line.

    Args:
        description: what the script does, for ``--help``.
        script: name of the script.

    Returns:
        A parser with a flag for every attribute of `Flags`, and ``--config``.
    """
    parser = ArgumentParser(prog=script, description=description)
    parser.add_argument("--config", action="config", help="YAML file of flags")
    hints = get_type_hints(Flags)
    defaults = Flags()
    for flag in fields(Flags):
        how: dict[str, Any] = {"type": hints[flag.name], "default": getattr(defaults, flag.name)}
        if hints[flag.name] is bool:
            how = {"action": "store_true"}
        elif flag.name == "methods":
            how |= {"type": str, "choices": list(EXTRACTIONS), "nargs": "+"}
        name = "--" + flag.name.replace("_", "-")
        parser.add_argument(name, help=flag.metadata["help"], **how)
    return parser


def parse_flags(arguments: Sequence[str] | None = None, description: str | None = None) -> Flags:
    """Reads the command line and config files.

    Args:
        arguments: of the command line; None reads `sys.argv`.
        description: what the script does, for ``--help``.

    Returns:
        The flags.
    """
    return flags_from(flags_parser(description).parse_args(arguments))


def flags_from(parsed: Namespace) -> Flags:
    """Takes the flags out of a parsed command line.

    Args:
        parsed: by `flags_parser`, to which a script may have added flags of its own.

    Returns:
        The flags.
    """
    return Flags(**{flag.name: parsed[flag.name] for flag in fields(Flags)})


def settle(flags: Flags, images: ImageData) -> Flags:
    """Decides the flags that were left open, by the data and the hardware.

    Args:
        flags: as parsed.
        images: the data set that was loaded.

    Returns:
        The flags with dataset, model, epochs, subset and output folder decided.
    """
    on_gpu = torch.cuda.is_available() and flags.accelerator in ("auto", "gpu", "cuda")
    model = flags.model
    if model == "auto":
        paper = _PAPER_MODELS.get(images.name, "cnn")
        model = paper if on_gpu or paper == "lenet" else "resnet8"
    given = flags.epochs, flags.max_train_samples, flags.curvature_samples
    usual = (_PAPER_EPOCHS, None, None) if on_gpu else _ON_CPU[model]
    epochs, subset, curvature_samples = (
        default if value is None else value for value, default in zip(given, usual, strict=True)
    )
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
