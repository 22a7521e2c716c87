"""Federations that start from a pre-trained network: no training at all, or fine-tuning.

Every client has the same body. ``closed_form_head`` fits the last layer of the untouched network
and trains nothing, ``random_features_head`` the same behind random features, and
``layer_features_head`` on what the blocks of the network compute. The other methods merge clients
that were fine-tuned from a new head, as people do; those of `peers.task_vectors` read what that
changed in the weights. Those with ``head_first_`` before their name merge clients that start from a
merged head in closed form and are fine-tuned gently: normalisation in eval mode, class frequencies
in the loss. Those with ``_unlabelled`` behind it merge the clients that were fine-tuned as people
do, and estimate the merged network's running statistics on samples of the server.
"""

from __future__ import annotations

import copy
import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning
import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from peers.task_vectors import PEERS, merge_by_task_vectors
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher import ClientUpdate, PriorCrossEntropy, fit_closed_form_head
from lightning_fedfisher.results.record import MergeRecord
from simulation.clients import (
    QUIET,
    Classifier,
    ClientFolder,
    ClientResult,
    TrainLosses,
    evaluation_device,
    merge,
    other_setting,
    update_callbacks,
)
from simulation.heads import scaled_to_logits, with_layer_features, with_random_features
from simulation.json_report import write_json
from simulation.partition import class_histogram, leaves_one_alone, reference_partition
from simulation.pretrained_report import record_federation
from simulation.pretrained_setting import (
    CLOSED_FORM,
    HEAD_FIRST,
    HEADS,
    LAYER_FEATURES,
    RANDOM_FEATURES,
    UNLABELLED,
    Flags,
    Task,
    merges_fine_tuned,
)
from simulation.results import Report, report_of, show, write
from simulation.round import say, warn_in_a_line
from simulation.scores import assess

_GENTLE_EPOCHS = 1
_EVALUATION_BATCH = 250
_ELSEWHERE = {"methods", "output_dir", "accelerator", "resume"}  # flags that change no client
_FOLDERS = _HEADS, _TUNED, _GENTLE = "updates", "fine-tuned", "head-first"


def start(parsed: Namespace, make_task: Callable[[Namespace], Task]) -> None:
    """Runs a recipe from its parsed command line, and says in one line what is wrong with it.

    Args:
        parsed: the command line.
        make_task: loads the data and names the network.
    """
    warn_in_a_line()
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")
    flags = Flags(**{flag.name: parsed[flag.name] for flag in fields(Flags)})
    try:
        run(make_task(parsed), replace(flags, methods=tuple(flags.methods)))
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")


class _FineTuner(Classifier):
    """Fine-tunes a network; gently, with normalisation in eval mode, if frequencies are given."""

    def __init__(self, network: nn.Module, task: Task, rate: float, counts: Any = None) -> None:
        super().__init__(network, rate)
        self._optimizer = task.optimizer
        self._gentle = counts is not None
        self._loss = nn.CrossEntropyLoss() if counts is None else PriorCrossEntropy(counts)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Computes the mean loss of a batch."""
        if self._gentle:
            self.network.eval()
        loss: Tensor = self._loss(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Makes the optimizer of the task."""
        return self._optimizer(self.parameters(), lr=self.learning_rate)


class Federation:
    """A federation of one task: the clients' updates, and what the methods make of them."""

    def __init__(self, task: Task, flags: Flags) -> None:
        """Splits the data; trains nothing yet.

        Args:
            task: data and network.
            flags: of the command line.
        """
        self.task, self.flags = task, flags
        stamp = f"{datetime.now():%Y-%m-%dT%H-%M-%S}-{task.name}-{task.network}"
        self.output = flags.output_dir or Path("runs") / stamp
        if not flags.resume and any((self.output / name).exists() for name in _FOLDERS):
            raise ValueError(f"{self.output} holds finished clients: add --resume to keep them")
        self.setting = {k: str(v) for k, v in asdict(flags).items() if k not in _ELSEWHERE}
        self.setting |= {"dataset": task.name, "network": task.network, **task.options}
        self._keep_setting()
        labels, seed = task.train.tensors[1].numpy(), flags.partition_seed
        self.parts = reference_partition(labels, flags.clients, flags.alpha, seed)
        self.histogram = class_histogram(labels, self.parts, task.classes)
        self.options: dict[str, Any] = {
            **QUIET,
            "accelerator": flags.accelerator,
            "enable_progress_bar": sys.stdout.isatty(),
        }
        self.device = evaluation_device(flags.accelerator)

    def _keep_setting(self) -> None:
        """Writes down what everything depends on, or refuses to go on with something else."""
        file = self.output / "setting.json"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, self.setting)
            return
        if (before := json.loads(file.read_text())) != self.setting:
            raise ValueError(other_setting(f"{self.output} was begun", before, self.setting))

    def samples(self, index: int) -> TensorDataset:
        """Takes one client's training samples."""
        rows = torch.from_numpy(self.parts[index])
        return TensorDataset(*(tensor[rows] for tensor in self.task.train.tensors))

    def headed(self, name: str, network: nn.Module) -> nn.Module:
        """Makes a network ready for a head in closed form.

        Args:
            name: one of `HEADS`.
            network: with pre-trained weights; it is not changed.
        """
        if name == RANDOM_FEATURES:
            return with_random_features(network, self.flags.random_features)
        if name == LAYER_FEATURES:
            try:
                return with_layer_features(network, self.task.test.tensors[0][:1])
            except ValueError as error:
                raise ValueError(f"{error}, or leave {name} out of --methods") from error
        return copy.deepcopy(network)

    def fit_heads(self, name: str, network: nn.Module) -> list[Path]:
        """Fits every client's head on the untouched network, which trains nothing.

        Args:
            name: of the update files.
            network: with pre-trained weights; it is not changed.

        Returns:
            The clients' update files.
        """
        tuner = _FineTuner(copy.deepcopy(network), self.task, 0.0).to(self.device)
        paths = []
        for index in range(self.flags.clients):
            path = self.output / _HEADS / f"client-{index}" / f"{name}.safetensors"
            paths.append(path)
            if self.flags.resume and path.is_file():
                continue
            say(f"client {index + 1} of {self.flags.clients}: one forward pass ({name})")
            loader = DataLoader(self.samples(index), _EVALUATION_BATCH)
            fit_closed_form_head(tuner, loader).save(path)
        return paths

    def fine_tune(
        self, name: str, network: nn.Module, methods: Sequence[str], gentle: bool
    ) -> tuple[list[ClientResult], list[Tensor], list[ClientFolder]]:
        """Fine-tunes every client that is not finished.

        Args:
            name: of the folder of these clients.
            network: where all of them start; it is not changed.
            methods: merge methods that their updates must serve.
            gentle: whether as after a closed-form head.

        Returns:
            Each client's result, log-probabilities on the test set, and folder.
        """
        flags, task = self.flags, self.task
        rate = (flags.gentle_rate or task.gentle_rate) if gentle else flags.learning_rate
        epochs = _GENTLE_EPOCHS if gentle else flags.epochs or task.epochs
        rate = rate or task.learning_rate
        setting = self.setting | {"rate": str(rate), "epochs": str(epochs)}
        results, predictions, folders = [], [], []
        for index in range(flags.clients):
            folder = ClientFolder(self.output / name, index)
            finished = folder.load(setting, methods) if flags.resume else None
            if finished is None:
                say(f"client {index + 1} of {flags.clients}: {epochs} epochs at {rate:g} ({name})")
                lightning.seed_everything(1000 * flags.seed + index, verbose=False)
                samples = self.samples(index)
                counts = self.histogram[index] if gentle else None
                # As people train: networks of Hugging Face come in eval mode.
                tuner = _FineTuner(copy.deepcopy(network), task, rate, counts).train()
                plain = DataLoader(samples, flags.batch_size)
                callbacks = update_callbacks(folder, methods, plain, flags.upload_budget)
                losses = TrainLosses()
                every = [losses, *callbacks.values()]
                trainer = Trainer(max_epochs=epochs, callbacks=every, **self.options)
                alone = leaves_one_alone(len(samples), flags.batch_size)
                trainer.fit(
                    tuner, DataLoader(samples, flags.batch_size, shuffle=True, drop_last=alone)
                )
                predicted = self.predict(tuner.network)
                seconds = {path.name: found.seconds or 0.0 for path, found in callbacks.items()}
                accuracy = assess(predicted, task.test.tensors[1]).accuracy
                finished = ClientResult(len(samples), accuracy, seconds, losses.losses), predicted
                folder.save(setting, *finished)
            say(f"client {index + 1} of {flags.clients}: {finished[0].accuracy:.1f}%")
            results.append(finished[0])
            predictions.append(finished[1])
            folders.append(folder)
        return results, predictions, folders

    def merged(
        self, method: str, paths: Sequence[Path], network: nn.Module
    ) -> tuple[MergeRecord, dict[str, Tensor]]:
        """Merges update files, and tests the merged network.

        Args:
            method: name of a merge method of the package, with ``_unlabelled`` behind it or not, or
                of a peer.
            paths: the clients' update files.
            network: takes the merged weights; it is not changed.

        Returns:
            What there is to tell of the merge, and the network's state dict.
        """
        say(f"merging with {method}")
        started = time.perf_counter()
        tuner = _FineTuner(copy.deepcopy(network), self.task, 0.0)
        unlabelled, name = None, method.removesuffix(UNLABELLED)
        if name != method:
            if self.task.unlabelled is None:
                raise ValueError(f"{method} needs unlabelled samples, and the task has none")
            unlabelled = DataLoader(TensorDataset(self.task.unlabelled), _EVALUATION_BATCH)
        package_method = merges_fine_tuned(method) or CLOSED_FORM
        result = merge(package_method, paths, tuner, None, self.options, unlabelled)
        record = result.record
        state: Mapping[str, Tensor] = result.state_dict
        if name in HEADS:
            state = scaled_to_logits(tuner.state_dict(), state)
        tuner.load_state_dict(state, strict=False)
        if name in PEERS:  # of that merge only the running statistics are used
            clients = [ClientUpdate.open(path).parameters for path in paths]
            start = _FineTuner(network, self.task, 0.0)
            # After FedAvg's, as tied weights have two names there.
            tuner.load_state_dict(merge_by_task_vectors(name, start, clients), strict=False)
            seconds = time.perf_counter() - started
            upload = record.upload_bytes
            record = MergeRecord(method, [], upload_bytes=upload, server_seconds=seconds)
        scored = assess(self.predict(tuner.network), self.task.test.tensors[1])
        # A head alone is small: all uploads are told in multiples of what fine-tuning sends.
        sent = [p for p in network.parameters() if p.requires_grad] + [*network.buffers()]
        whole = sum(tensor.nbytes for tensor in sent)
        record = replace(record, method=method, score=scored, fedavg_bytes=whole)
        return record, {n: t.clone() for n, t in tuner.network.state_dict().items()}

    @torch.inference_mode()
    def predict(self, network: nn.Module) -> Tensor:
        """Computes log-probabilities on the test set, of shape ``(n, classes)``."""
        network.to(self.device).eval()
        loader = DataLoader(TensorDataset(self.task.test.tensors[0]), _EVALUATION_BATCH)
        found = [network(x.to(self.device)).float().log_softmax(1).cpu() for (x,) in loader]
        network.cpu()
        return torch.cat(found)


def run(task: Task, flags: Flags) -> Report:
    """Simulates a federation, and writes its results.

    Args:
        task: data and network.
        flags: of the command line.

    Returns:
        The content of ``results.json``.
    """
    federation = Federation(task, flags)
    counts = [len(part) for part in federation.parts]
    say(f"data: {task.note}\n{flags.clients} clients of {task.name} hold {counts} samples")
    network = task.build(flags.seed)
    found: dict[str, tuple[MergeRecord, dict[str, Tensor]]] = {}
    plain = [m for m in flags.methods if merges_fine_tuned(m)]
    gentle = [m.removeprefix(HEAD_FIRST) for m in flags.methods if m.startswith(HEAD_FIRST)]
    results, predictions = list[ClientResult](), list[Tensor]()
    heads = [n for n in HEADS if n in flags.methods or (gentle and n == task.first_head)]
    bodies = {name: federation.headed(name, network) for name in heads}  # or what is wrong is told
    for name, body in bodies.items():
        found[name] = federation.merged(name, federation.fit_heads(name, body), body)
    if plain:
        names = [*dict.fromkeys(filter(None, map(merges_fine_tuned, plain)))]
        tuned = federation.fine_tune(_TUNED, network, names, gentle=False)
        results, predictions, folders = tuned
        _merge_all(federation, plain, folders, results, network, "", found)
    if gentle:
        shared = bodies[task.first_head]
        shared.load_state_dict(found[task.first_head][1])
        tuned = federation.fine_tune(_GENTLE, shared, gentle, gentle=True)
        if not plain:
            results, predictions = tuned[:2]
        _merge_all(federation, gentle, tuned[2], tuned[0], shared, HEAD_FIRST, found)
    merges = [found[method][0] for method in flags.methods]
    record = record_federation(
        *(task, flags, federation.histogram, merges, results, predictions), federation.device
    )
    report, first = report_of(record, flags.methods, task.note), flags.methods[0]
    write(federation.output, report, record, found[first][1])
    show(report, Console(), f"Test accuracy on {task.name}")
    say(f"written: {federation.output}/results.json, report.html, merged.safetensors ({first})")
    return report


def _merge_all(
    federation: Federation,
    methods: Sequence[str],
    folders: Sequence[ClientFolder],
    results: Sequence[ClientResult],
    network: nn.Module,
    prefix: str,
    found: dict[str, tuple[MergeRecord, dict[str, Tensor]]],
) -> None:
    """Merges the same clients with several methods, and notes what clients spent."""
    for method in methods:
        paths = [folder.update(merges_fine_tuned(method) or method) for folder in folders]
        record, state = federation.merged(method, paths, network)
        spent = [result.extraction_seconds[paths[0].name] for result in results]
        record = replace(record, method=prefix + method, client_seconds=sum(spent) / len(spent))
        found[prefix + method] = record, state
