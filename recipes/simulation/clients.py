"""The steps of a simulated federation: fit a client, merge the updates, evaluate a model."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import lightning
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)
from tqdm import tqdm

from lightning_fedfisher import METHODS, FedFisherCallback, FisherMergeModule
from lightning_fedfisher.merge.compatibility import UpdateSource
from lightning_fedfisher.merge.methods import MergeMethod, MethodName
from lightning_fedfisher.results.from_merge import describe_merge
from lightning_fedfisher.results.record import MergeRecord, ModelScore
from simulation.data import TensorImages, collate_images

EXTRACTIONS: dict[str, tuple[str, str]] = {
    "fedavg": ("identity", "exact"),
    "fisher_merge": ("diagonal", "exact"),
    "regmean": ("kfac", "normalised"),
    "fedfisher_diag": ("diagonal", "exact"),
    "fedfisher_kfac": ("kfac", "exact"),
    "fedfisher": ("kfac", "normalised"),
}
"""Curvature and Fisher type that a client extracts for each method."""

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}
"""Options of a Trainer that says nothing."""

_EVALUATION_BATCH = 500
_EXTRACTION_BATCH = 250
_LABELLED_SAMPLES = 500


class Classifier(LightningModule):
    """A network trained with SGD and cross-entropy, as in the paper."""

    def __init__(self, network: nn.Module, learning_rate: float) -> None:
        """Wraps a network.

        Args:
            network: maps images to logits.
            learning_rate: of SGD with momentum 0.9.
        """
        super().__init__()
        self.network = network
        self.learning_rate = learning_rate

    def forward(self, x: Tensor) -> Tensor:
        """Maps images ``(n, channels, height, width)`` to logits ``(n, classes)``."""
        return cast(Tensor, self.network(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        x, y = batch
        loss = functional.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with the paper's momentum."""
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


@dataclass(frozen=True)
class ClientResult:
    """What the simulation keeps of a finished client, beside its updates.

    Attributes:
        num_samples: training samples it holds.
        accuracy: of its own model, percent of the test set.
        extraction_seconds: wall-clock time of each extraction, by update file name.
        train_loss: mean loss of each epoch.
    """

    num_samples: int
    accuracy: float
    extraction_seconds: Mapping[str, float]
    train_loss: list[float] = field(default_factory=list)


class _TrainLosses(Callback):
    """Keeps the training loss of every epoch, which loggers may not."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))


class ClientFolder:
    """Files of one client below the output folder: present means finished."""

    def __init__(self, output_dir: Path, index: int) -> None:
        """Names the files; creates nothing.

        Args:
            output_dir: of the federation.
            index: of the client.
        """
        self.updates = output_dir / "updates" / f"client-{index}"
        self._result = output_dir / "clients" / f"client-{index}.json"
        self._predictions = self._result.with_suffix(".safetensors")

    def update(self, method: str) -> Path:
        """The update file that a method merges."""
        curvature, fisher = EXTRACTIONS[method]
        name = curvature if curvature == "identity" else f"{curvature}-{fisher}"
        return self.updates / f"{name}.safetensors"

    def save(self, setting: Mapping[str, Any], result: ClientResult, predicted: Tensor) -> None:
        """Marks the client as finished, last of all."""
        self._result.parent.mkdir(parents=True, exist_ok=True)
        save_file({"log_probabilities": predicted}, self._predictions)
        text = json.dumps({"setting": setting, "result": asdict(result)}, indent=2)
        partial = self._result.with_suffix(".partial")
        partial.write_text(text)
        partial.replace(self._result)

    def load(
        self, setting: Mapping[str, Any], methods: Sequence[str]
    ) -> tuple[ClientResult, Tensor] | None:
        """The finished client, or None.

        Args:
            setting: everything that its training depended on.
            methods: those its updates must serve.

        Returns:
            The result and its log-probabilities on the test set.

        Raises:
            ValueError: if it was trained under another setting.
        """
        if not self._result.is_file():
            return None
        saved = json.loads(self._result.read_text())
        if saved["setting"] != setting:
            changed = sorted(
                key
                for key in saved["setting"].keys() | setting.keys()
                if saved["setting"].get(key) != setting.get(key)
            )
            raise ValueError(
                f"{self._result} was trained with another {', '.join(changed)}: resume with the "
                "same flags, or choose another --output-dir"
            )
        if not all(self.update(method).is_file() for method in methods):
            return None
        return ClientResult(**saved["result"]), load_file(self._predictions)["log_probabilities"]


def fit_client(
    network: nn.Module,
    samples: TensorImages,
    folder: ClientFolder,
    methods: Sequence[str],
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    curvature_samples: int | None,
    upload_budget: float | None,
    seed: int,
    trainer_options: Mapping[str, Any],
) -> tuple[Classifier, dict[str, float], list[float]]:
    """Trains one client; the callbacks on its Trainer write one update for each kind needed.

    Args:
        network: with the weights all clients start from; trained in place.
        samples: the client's own.
        folder: where its updates go.
        methods: merge methods the updates must serve.
        epochs: of local training.
        learning_rate: of SGD.
        batch_size: of SGD.
        curvature_samples: samples to average the curvature over; all if None.
        upload_budget: as the callback takes it.
        seed: of shuffling and augmentation.
        trainer_options: accelerator, devices, logger and the like.

    Returns:
        The trained classifier, the seconds of each extraction by update file name, and the
        training loss of each epoch.
    """
    lightning.seed_everything(seed, verbose=False)
    plain = DataLoader(
        samples.without_augmentation(), batch_size=_EXTRACTION_BATCH, collate_fn=collate_images
    )
    callbacks = {
        folder.update(method): FedFisherCallback(
            folder.update(method),
            curvature=cast(Any, EXTRACTIONS[method][0]),
            fisher=cast(Any, EXTRACTIONS[method][1]),
            max_samples=curvature_samples,
            upload_budget=upload_budget,
            dataloader=plain,
        )
        for method in methods
    }
    classifier = Classifier(network, learning_rate)
    curve = _TrainLosses()
    every = [curve, *callbacks.values()]
    trainer = Trainer(max_epochs=epochs, callbacks=every, **trainer_options)
    loader = DataLoader(samples, batch_size=batch_size, shuffle=True, collate_fn=collate_images)
    trainer.fit(classifier, loader)
    seconds = {path.name: callback.seconds or 0.0 for path, callback in callbacks.items()}
    return classifier, seconds, curve.losses


@dataclass(frozen=True)
class MergeResult:
    """What one method made of the updates.

    Attributes:
        state_dict: the merged model.
        seconds: wall-clock time from the updates to the model.
        labels: labelled samples the server used.
        history: the merge, sweep by sweep (see `FisherMergeModule.history`).
        record: of the merge.
    """

    state_dict: dict[str, Tensor]
    seconds: float
    labels: int
    history: list[dict[str, float]]
    record: MergeRecord


def labelled_samples(train: TensorImages, seed: int) -> TensorImages:
    """Those that the published methods look at on the server.

    Args:
        train: all training samples.
        seed: of the federation.

    Returns:
        Un-augmented samples drawn at random.
    """
    plain = train.without_augmentation()
    count = min(_LABELLED_SAMPLES, len(plain))
    return plain.subset(np.random.default_rng(seed).choice(len(plain), count, replace=False))


def merge(
    method: MethodName | MergeMethod,
    updates: Sequence[UpdateSource],
    model: nn.Module | None,
    labelled: TensorImages | None,
    trainer_options: Mapping[str, Any],
) -> MergeResult:
    """Merges updates with one method; only methods that select an iterate see labels.

    Args:
        method: its name, or a method of one's own.
        updates: one for each client.
        model: takes the merged weights, if any; methods that see labels need it.
        labelled: samples for the methods that need some; they return their last iterate if None.
        trainer_options: accelerator, devices, logger and the like.

    Returns:
        The merged model and what it took.
    """
    started = time.perf_counter()
    module = FisherMergeModule(updates, model=model, method=cast(Any, method))
    row = METHODS[method] if isinstance(method, str) else method
    loader = None
    if labelled is not None and row.keeps_best:
        loader = DataLoader(labelled, batch_size=_EVALUATION_BATCH, collate_fn=collate_images)
    trainer = Trainer(
        max_epochs=-1,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # every process looks at all labelled samples
        **trainer_options,
    )
    trainer.fit(module, val_dataloaders=loader)
    seconds = time.perf_counter() - started
    return MergeResult(
        module.merged_state_dict(),
        seconds,
        module.server_labels,
        module.history,
        describe_merge(module, seconds),
    )


def predict(classifier: Classifier, samples: TensorImages, device: torch.device) -> Tensor:
    """Class log-probabilities of a model.

    Args:
        classifier: the model; left in eval mode on the device.
        samples: images.
        device: where to run.

    Returns:
        Log-probabilities ``(n, classes)`` on the CPU.
    """
    classifier.to(device).eval()
    loader = DataLoader(samples, batch_size=_EVALUATION_BATCH, collate_fn=collate_images)
    with torch.inference_mode():
        batches = [
            classifier(x.to(device)).log_softmax(dim=1).cpu()
            for x, _ in tqdm(loader, desc="evaluate", delay=2, leave=False, disable=None)
        ]
    return torch.cat(batches)


def ensemble(predictions: Sequence[Tensor]) -> Tensor:
    """Log of the mean probability over models: what inference with all of them would say.

    Args:
        predictions: log-probabilities ``(n, classes)`` of each model.

    Returns:
        Log-probabilities ``(n, classes)``.
    """
    return torch.stack(list(predictions)).logsumexp(dim=0) - math.log(len(predictions))


def assess(log_probabilities: Tensor, labels: Tensor) -> ModelScore:
    """Everything that is told of a model on test data.

    Args:
        log_probabilities: ``(n, classes)``.
        labels: ``(n,)``.

    Returns:
        Accuracy, negative log-likelihood, calibration error and confusion.
    """
    classes = log_probabilities.shape[1]
    off = multiclass_calibration_error(log_probabilities.exp(), labels, classes, n_bins=15)
    confusion = multiclass_confusion_matrix(log_probabilities, labels, classes)
    return ModelScore(*score(log_probabilities, labels), 100 * float(off), confusion.tolist())


def score(log_probabilities: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy in percent and negative log-likelihood.

    Args:
        log_probabilities: ``(n, classes)``.
        labels: ``(n,)``.

    Returns:
        Accuracy, and the mean negative log-likelihood in nats.
    """
    classes = log_probabilities.shape[1]
    accuracy = multiclass_accuracy(log_probabilities, labels, num_classes=classes, average="micro")
    return 100 * float(accuracy), float(functional.nll_loss(log_probabilities, labels))
