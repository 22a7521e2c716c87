"""What the recipes that start from a pre-trained network are asked: data, network and flags."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from jsonargparse import ArgumentParser
from peers.task_vectors import PEERS
from torch import Tensor, nn
from torch.utils.data import TensorDataset

CLOSED_FORM, RANDOM_FEATURES = "closed_form_head", "random_features_head"
LAYER_FEATURES = "layer_features_head"
HEADS = (CLOSED_FORM, RANDOM_FEATURES, LAYER_FEATURES)
HEAD_FIRST, UNLABELLED = "head_first_", "_unlabelled"
FINE_TUNED = ("fedavg", "fisher_merge", "regmean", "fedfisher")
METHODS = (
    CLOSED_FORM,
    RANDOM_FEATURES,
    *FINE_TUNED,
    *(HEAD_FIRST + method for method in FINE_TUNED),
    *PEERS,
)
"""What the recipes compare: none of it takes labels on the server."""

DEFAULT = (CLOSED_FORM, RANDOM_FEATURES, "fedavg", "regmean", "fedfisher")
"""What they compare if nothing is said: not what takes a backward pass for each class."""


@dataclass(frozen=True)
class Task:
    """A data set and the pre-trained network for it.

    Attributes:
        name: of the data set.
        network: name of the network.
        note: where the data comes from.
        train: inputs and labels of the clients, in memory.
        test: the same.
        classes: number of classes.
        build: gives the network with pre-trained weights and a head from the seed.
        optimizer: of the fine-tuning, given parameters and learning rate.
        learning_rate: of ordinary fine-tuning.
        gentle_rate: of fine-tuning after a closed-form head.
        epochs: of ordinary fine-tuning.
        first_head: name of the closed-form head that is fine-tuned gently.
        options: what else the task was made of, by the names of flags.
        unlabelled: inputs that the server has, and no client; None for none.
    """

    name: str
    network: str
    note: str
    train: TensorDataset
    test: TensorDataset
    classes: int
    build: Callable[[int], nn.Module]
    optimizer: Callable[..., torch.optim.Optimizer]
    learning_rate: float
    gentle_rate: float
    epochs: int
    first_head: str
    options: Mapping[str, str]
    unlabelled: Tensor | None = None


@dataclass(frozen=True)
class Flags:
    """The command line that the recipes share."""

    data_dir: Path | None = None
    clients: int = 5
    alpha: float = 0.1
    partition_seed: int = 3
    seed: int = 0
    epochs: int | None = None
    max_train_samples: int | None = None
    max_test_samples: int | None = None
    learning_rate: float | None = None
    gentle_rate: float | None = None
    random_features: int = 1000
    batch_size: int = 32
    upload_budget: float = 1.0
    methods: tuple[str, ...] = DEFAULT
    output_dir: Path | None = None
    accelerator: str = "auto"
    resume: bool = False


_HELP = {
    "data_dir": "folder or file of the data",
    "clients": "number of clients",
    "alpha": "how uneven the split is: less is more uneven",
    "partition_seed": "seed of the split",
    "seed": "seed of the new head and of training",
    "epochs": "local epochs of ordinary fine-tuning",
    "max_train_samples": "train on a random subset of this size",
    "max_test_samples": "test on a random subset of this size",
    "learning_rate": "of ordinary fine-tuning",
    "gentle_rate": "of fine-tuning after a closed-form head",
    "random_features": "nonlinear features before a head in closed form",
    "batch_size": "batch size of local training",
    "upload_budget": "most bytes of an update, in multiples of a FedAvg upload",
    "methods": "merge methods to compare",
    "output_dir": "folder for everything written; a new one by default",
    "accelerator": "Lightning accelerator",
    "resume": "go on in --output-dir, keeping finished clients",
}


def merges_fine_tuned(method: str) -> str | None:
    """Names the method whose updates a method merges, of clients fine-tuned as people do.

    Args:
        method: one of `METHODS`, or one with `UNLABELLED` behind it.

    Returns:
        A merge method of the package; None if it merges other clients.
    """
    name = method.removesuffix(UNLABELLED)
    return "fedavg" if name in PEERS else name if name in FINE_TUNED else None


def shared_parser(
    description: str | None, script: str, methods: Sequence[str] = METHODS
) -> ArgumentParser:
    """Describes the command line that the recipes share.

    Args:
        description: what the script does, for ``--help``.
        script: name of the script.
        methods: what it can compare.
    """
    parser = ArgumentParser(prog=script, description=description)
    hints = get_type_hints(Flags)
    for flag in fields(Flags):
        how: dict[str, Any] = {"type": hints[flag.name], "default": flag.default}
        if hints[flag.name] is bool:
            how = {"action": "store_true"}
        elif flag.name == "methods":
            how = {"type": str, "choices": methods, "nargs": "+", "default": list(flag.default)}
        parser.add_argument("--" + flag.name.replace("_", "-"), help=_HELP[flag.name], **how)
    return parser
