"""The steps of a simulated federation: fits a client, merges updates, tests a model."""

from __future__ import annotations

import json
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
from tqdm import tqdm

from lightning_fedfisher import FedFisherCallback, FisherMergeModule
from lightning_fedfisher.batch_norms import tracked_norms
from lightning_fedfisher.extraction.sampling import MaxSamples
from lightning_fedfisher.merge.compatibility import UpdateSource
from lightning_fedfisher.merge.methods import METHODS, MergeMethod
from lightning_fedfisher.results.from_merge import describe_merge
from lightning_fedfisher.results.record import MergeRecord
from simulation.data import TensorImages, collate_images
from simulation.json_report import write_json
from simulation.partition import leaves_one_alone

EXTRACTIONS: dict[str, tuple[str, str]] = {
    "fedavg": ("identity", "exact"),
    "fisher_merge": ("diagonal", "exact"),
    "regmean": ("kfac", "normalised"),
    "fedfisher_diag": ("diagonal", "exact"),
    "fedfisher_kfac": ("kfac", "exact"),
    "fedfisher": ("kfac", "normalised"),
}
"""The kind of curvature and the Fisher type that clients extract for each merge method."""

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}
"""Options of a Trainer that runs on the CPU and prints, logs and saves nothing."""

_EVALUATION_BATCH = 500
_EXTRACTION_BATCH = 250
_LABELLED_SAMPLES = 500


class Classifier(LightningModule):
    """A network trained with SGD and cross-entropy, as in the paper."""

    def __init__(self, network: nn.Module, learning_rate: float) -> None:
        """Wraps a network.

        Args:
            network: maps images ``(n, channels, height, width)`` to logits ``(n, classes)``.
            learning_rate: of SGD with momentum 0.9.
        """
        super().__init__()
        self.network = network
        self.learning_rate = learning_rate

    def forward(self, x: Tensor) -> Tensor:
        """Maps images ``(n, channels, height, width)`` to logits ``(n, classes)``."""
        return cast(Tensor, self.network(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Computes the mean cross-entropy of a batch of images and labels."""
        x, y = batch
        loss = functional.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Makes SGD with the paper's momentum."""
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


@dataclass(frozen=True)
class ClientResult:
    """The results of a finished client that are kept beside its updates.

    Attributes:
        num_samples: number of its training samples.
        accuracy: test accuracy of its own model, in percent.
        extraction_seconds: seconds of each extraction, by the name of the update file.
        train_loss: mean training loss of each epoch.
    """

    num_samples: int
    accuracy: float
    extraction_seconds: Mapping[str, float]
    train_loss: list[float] = field(default_factory=list)


class TrainLosses(Callback):
    """Keeps the training loss of every epoch.

    Attributes:
        losses: the mean training loss of each epoch so far.
    """

    def __init__(self) -> None:
        """Starts with none."""
        self.losses: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds what the module logged as ``train_loss``."""
        self.losses.append(float(trainer.callback_metrics["train_loss"]))


class ClientFolder:
    """The files of one client; once its results are there, the client is finished."""

    def __init__(self, output_dir: Path, index: int) -> None:
        """Names the files and creates none.

        Args:
            output_dir: folder of the round.
            index: of the client, counted from 0.
        """
        self.updates = output_dir / "updates" / f"client-{index}"
        self._result = output_dir / "clients" / f"client-{index}.json"
        self._predictions = self._result.with_suffix(".safetensors")

    def update(self, method: str) -> Path:
        """Names the update file that a method merges.

        Args:
            method: name of the merge method.

        Returns:
            The path; methods that need the same curvature share a file.
        """
        curvature, fisher = EXTRACTIONS[method]
        name = curvature if curvature == "identity" else f"{curvature}-{fisher}"
        return self.updates / f"{name}.safetensors"

    def save(self, setting: Mapping[str, Any], result: ClientResult, predicted: Tensor) -> None:
        """Writes the results of a client, which marks it as finished.

        Args:
            setting: everything that its training depended on.
            result: of the client.
            predicted: its log-probabilities ``(n, classes)`` on the test set.
        """
        self._result.parent.mkdir(parents=True, exist_ok=True)
        save_file({"log_probabilities": predicted}, self._predictions)
        write_json(self._result, {"setting": setting, "result": asdict(result)})

    def load(
        self, setting: Mapping[str, Any], methods: Sequence[str]
    ) -> tuple[ClientResult, Tensor] | None:
        """Loads the results of a client, if it is finished.

        Args:
            setting: everything that its training should depend on.
            methods: merge methods that its updates must serve.

        Returns:
            Its result and its log-probabilities ``(n, classes)`` on the test set; None if it is not
            finished or lacks an update.

        Raises:
            ValueError: if it was trained under another setting.
        """
        if not self._result.is_file():
            return None
        saved = json.loads(self._result.read_text())
        if saved["setting"] != setting:
            what = f"{self._result} was trained"
            raise ValueError(other_setting(what, saved["setting"], setting))
        if not all(self.update(method).is_file() for method in methods):
            return None
        return ClientResult(**saved["result"]), load_file(self._predictions)["log_probabilities"]


def other_setting(what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Says that something cannot be resumed.

    Args:
        what: it, and what was done to it.
        before: the setting that it was done with.
        now: another one.

    Returns:
        A message that names what differs.
    """
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return (
        f"{what} with another {', '.join(changed)}: resume with the same flags, or choose another "
        "--output-dir"
    )


def update_callbacks(
    folder: ClientFolder,
    methods: Sequence[str],
    plain: DataLoader[Any],
    upload_budget: float | None,
    max_samples: MaxSamples = "auto",
) -> dict[Path, FedFisherCallback]:
    """Makes the callbacks that write what methods merge.

    Args:
        folder: where the updates go.
        methods: merge methods that they must serve; those that need the same share one.
        plain: the client's own training samples, without augmentation.
        upload_budget: most bytes of an update, in multiples of its weights; None sends everything.
        max_samples: number of samples to average the curvature over.

    Returns:
        The callbacks, by the file that each writes.
    """
    return {
        folder.update(method): FedFisherCallback(
            folder.update(method),
            curvature=cast(Any, EXTRACTIONS[method][0]),
            fisher=cast(Any, EXTRACTIONS[method][1]),
            max_samples=max_samples,
            upload_budget=upload_budget,
            dataloader=plain,
        )
        for method in methods
    }


def evaluation_device(accelerator: str) -> torch.device:
    """Chooses where models are tested.

    Args:
        accelerator: Lightning's, as the user chose it.
    """
    return torch.device("cuda" if torch.cuda.is_available() and accelerator != "cpu" else "cpu")


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
    """Trains one client; callbacks on its Trainer write an update for each kind of curvature.

    Args:
        network: has the weights that all clients start from, and is trained in place.
        samples: the client's own training samples.
        folder: where its updates go.
        methods: merge methods that the updates must serve.
        epochs: number of epochs of local training.
        learning_rate: of SGD.
        batch_size: samples in a step of SGD.
        curvature_samples: number of samples to average the curvature over; None takes all.
        upload_budget: most bytes of an update, in multiples of its weights; None sends everything.
        seed: of shuffling and augmentation.
        trainer_options: further options of the Trainer, such as accelerator and logger.

    Returns:
        The trained classifier, the seconds of each extraction by the name of its update file, and
        the training loss of each epoch.
    """
    lightning.seed_everything(seed, verbose=False)
    plain = DataLoader(
        samples.without_augmentation(), batch_size=_EXTRACTION_BATCH, collate_fn=collate_images
    )
    callbacks = update_callbacks(folder, methods, plain, upload_budget, curvature_samples)
    classifier = Classifier(network, learning_rate)
    curve = TrainLosses()
    every = [curve, *callbacks.values()]
    trainer = Trainer(max_epochs=epochs, callbacks=every, **trainer_options)
    alone = bool(tracked_norms(network)) and leaves_one_alone(len(samples), batch_size)
    loader = DataLoader(
        samples, batch_size, shuffle=True, drop_last=alone, collate_fn=collate_images
    )
    trainer.fit(classifier, loader)
    seconds = {path.name: callback.seconds or 0.0 for path, callback in callbacks.items()}
    return classifier, seconds, curve.losses


@dataclass(frozen=True)
class MergeResult:
    """A merged model, and what it took to merge it.

    Attributes:
        state_dict: the merged model.
        seconds: wall-clock time from the updates to the model.
        labels: number of labelled samples that the server used.
        history: numbers of each epoch of the merge (see `FisherMergeModule.history`).
        record: all that there is to report of the merge.
    """

    state_dict: dict[str, Tensor]
    seconds: float
    labels: int
    history: list[dict[str, float]]
    record: MergeRecord


def labelled_samples(train: TensorImages, seed: int) -> TensorImages:
    """Draws the labelled samples by which the published methods choose their iterate.

    Args:
        train: all training samples.
        seed: of the draw.

    Returns:
        500 samples, without augmentation, or all if there are fewer.
    """
    plain = train.without_augmentation()
    count = min(_LABELLED_SAMPLES, len(plain))
    return plain.subset(np.random.default_rng(seed).choice(len(plain), count, replace=False))


def merge(
    method: str | MergeMethod,
    updates: Sequence[UpdateSource],
    model: nn.Module | None,
    labelled: TensorImages | None,
    trainer_options: Mapping[str, Any],
    unlabelled: DataLoader[Any] | None = None,
) -> MergeResult:
    """Merges updates with one method.

    Args:
        method: name of a method, or a `MergeMethod` of your own.
        updates: one for each client, as files or in memory.
        model: receives the merged weights; None merges without one. Methods that look at labels
            need it.
        labelled: samples by which the published methods choose their iterate; with None they return
            their last one. Other methods never see them.
        trainer_options: further options of the Trainer, such as accelerator and logger.
        unlabelled: batches of inputs to estimate running statistics on; None merges the clients'.

    Returns:
        The merged model, and what it took to merge it.
    """
    started = time.perf_counter()
    module = FisherMergeModule(
        updates, model=model, method=cast(Any, method), statistics_loader=unlabelled
    )
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
        describe_merge(module.result, seconds),
    )


def predict(classifier: Classifier, samples: TensorImages, device: torch.device) -> Tensor:
    """Computes the log-probabilities of a model on test images.

    Args:
        classifier: the model; it is left in eval mode on the device.
        samples: the images.
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
