"""FedFisherCallback: extracts a client's update at the end of `Trainer.fit` and writes it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_fedfisher.client_run import ClientRun
from lightning_fedfisher.curvature.registry import CurvatureType
from lightning_fedfisher.curvature.summary import CurvatureSummary, summarize_curvature
from lightning_fedfisher.distributed.lightning_packages import is_lightnings
from lightning_fedfisher.distributed.lightning_strategies import on_rank_zero, require_whole_model
from lightning_fedfisher.extraction.fisher_types import FisherType
from lightning_fedfisher.extraction.options import ExtractionOptions
from lightning_fedfisher.extraction.positions import Positions
from lightning_fedfisher.extraction.result import ExtractedCurvature
from lightning_fedfisher.extraction.sampling import MaxSamples, most_samples, partition_samples
from lightning_fedfisher.tracking import logged_keys as keys
from lightning_fedfisher.tracking.client import log_update, progress_log, warn_of_used_runs
from lightning_fedfisher.update.client_update import ClientUpdate
from lightning_fedfisher.update.output_path import path_beside_others


class FedFisherCallback(Callback):
    """Turns a finished fit into a `ClientUpdate`: the weights and the curvature around them.

    It works without arguments. Once the training ends, normally or early, it extracts the curvature
    over every twelfth training sample (at least 300), each once, and rank 0 writes
    ``<log dir or default_root_dir>/fedfisher/update.safetensors``. Before the training it rehearses
    the extraction on two samples, so that a model that is not supported is refused at once.
    Weights, gradients, modes and random states stay as they are. After an exception or Ctrl-C
    nothing is written. Under ``fast_dev_run`` one batch is extracted and nothing is written.

    With ``closed_form_head=True`` nothing has to be trained: the last layer is fitted to all labels
    in one forward pass, at the end of `Trainer.fit`, `Trainer.validate` or `Trainer.predict`, and
    the update holds that layer alone (see `fit_closed_form_head`).

    Attributes:
        update: The update as it is sent; None until the fit has ended.
        path: The file that was written; None until the fit has ended, and under ``fast_dev_run``.
        seconds: Wall-clock time that the extraction took; None until the fit has ended.

    Example:
        >>> callback = FedFisherCallback(curvature="ekfac")
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
        >>> callback.update is None  # until trainer.fit(module, train_loader) has ended
        True
    """

    def __init__(
        self,
        output: str | os.PathLike[str] | None = None,
        *,
        curvature: CurvatureType = ExtractionOptions.curvature,
        fisher: FisherType = ExtractionOptions.fisher,
        likelihood: str = ExtractionOptions.likelihood,
        max_samples: MaxSamples = ExtractionOptions.max_samples,
        batch_size: int | None = ExtractionOptions.batch_size,
        dataloader: Iterable[Any] | None = None,
        num_samples: int | None = None,
        # As `Forward`, but that LightningCLI would want to see Tensor in a function's annotation.
        forward: Callable[[nn.Module, Any], Any] | None = ExtractionOptions.forward,
        ignore_index: float | None = ExtractionOptions.ignore_index,
        draws: int = ExtractionOptions.draws,
        positions: Positions = ExtractionOptions.positions,
        seed: int = ExtractionOptions.seed,
        estimate_statistics: bool = True,
        closed_form_head: bool | str = False,
        upload_budget: float | Literal["auto"] | None = "auto",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Checks and keeps the options.

        Args:
            output: File to write; None puts it under the trainer's log directory, under a numbered
                name with a warning if another update is there.
            curvature: Kind of curvature; ``"identity"`` sends the weights alone. For this and the
                options not explained here, see `ExtractionOptions`.
            fisher: Fisher type.
            likelihood: Name of the likelihood of the labels given the logits.
            max_samples: Most samples to average over: a number takes a seeded random subset,
                ``"auto"`` takes every twelfth sample but at least 300 (for a closed-form head, all
                of them), None takes all.
            batch_size: Number of samples in a batch; None keeps the loader's own.
            dataloader: The client's samples, if they are not those behind the training loader, for
                example to extract without its augmentation; None takes the training loader.
            num_samples: Number of training samples the client holds, which is its weight in the
                merge; None counts them, which takes a map-style data set.
            forward: Function that maps ``(module, batch)`` to logits, or to ``(logits, labels)``.
                It is needed if batches are not ``(x, y)`` or the module's output is not its logits.
            ignore_index: Label that stands for "not observed"; None takes what a `torch.nn` loss
                that the module holds says, and else -100.
            draws: Number of directions drawn for each sample, for the Fisher types that draw.
            positions: Most positions of each sample that a layer's factors are computed from;
                ``"auto"`` takes a sixteenth of them (at least 2), None takes all.
            seed: Seed of the subset and of all draws.
            estimate_statistics: Whether BatchNorm layers in training mode get running statistics
                anew, which takes a forward pass over the same samples. Those in the update are
                then not the module's, which stays as it is. Nothing changes for layers in eval
                mode, nor with ``curvature="identity"``, which runs nothing.
            closed_form_head: Whether to fit the last layer by least squares in place of extracting
                curvature; or the name of the layer, if the outputs of several are the logits. The
                other layers must be the same on all clients. After a fit that sent an update,
                validation and prediction send none.
            upload_budget: Most bytes of the file, in multiples of what FedAvg sends. Weights and
                curvature are rounded to fit (see `ClientUpdate.compressed`). None rounds nothing,
                and neither does any budget if the update takes up to 16 KiB. ``"auto"`` is 1, and
                None with ``closed_form_head``, whose merge is exact.
            metadata: Further text to send along, by names; None sends none.

        Raises:
            ValueError: If an option is unknown or out of range.
        """
        if closed_form_head and curvature not in (ExtractionOptions.curvature, "input_gram"):
            raise ValueError(
                f"closed_form_head extracts the inputs' second moment, and not {curvature} "
                "curvature: leave curvature= out"
            )
        options = ExtractionOptions(
            curvature="input_gram" if closed_form_head else curvature,
            fisher=fisher,
            likelihood=likelihood,
            max_samples=None if closed_form_head and max_samples == "auto" else max_samples,
            batch_size=batch_size,
            forward=forward,
            ignore_index=ignore_index,
            draws=draws,
            seed=seed,
            positions=positions,
            estimate_statistics=False if closed_form_head else estimate_statistics,
        )
        # NumPy's whole numbers as well.
        counted = isinstance(num_samples, Integral) and int(num_samples) >= 1
        if num_samples is not None and not counted:
            raise ValueError(f"num_samples must be a whole number, at least 1, got {num_samples!r}")
        if upload_budget == "auto":
            upload_budget = None if closed_form_head else 1.0
        if upload_budget is not None and not 0 < upload_budget < math.inf:
            raise ValueError(f"upload_budget must be greater than 0, got {upload_budget!r}")
        for item in (metadata or {}).items():
            if not all(isinstance(part, str) for part in item):
                raise ValueError(f"metadata must map strings to strings, got {item}")
        self._client = ClientRun(
            options,
            closed_form_head,
            dataloader,
            None if num_samples is None else int(num_samples),
            dict(metadata or {}),
            upload_budget,
            None if output is None else Path(output),
        )
        self.update: ClientUpdate | None = None
        self.path: Path | None = None
        self.seconds: float | None = None
        self._sent_by_fit = False

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            output=str(self._client.output),
            curvature=self._client.options.curvature,
            fisher=self._client.options.fisher,
        )

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" and not self._sends_at(stage):
            return
        self._sent_by_fit = False
        self.update = self.path = self.seconds = None
        require_whole_model(trainer, "FedFisherCallback")
        if self._client.output is not None and self._client.output.is_dir():
            raise ValueError(f"output={self._client.output} is a folder: name a file in it")
        callbacks = _callbacks(trainer)
        later = callbacks[callbacks.index(self) + 1 :]
        names = ("WeightAveraging", "StochasticWeightAveraging")
        averaging = [c for c in later if is_lightnings(c, *names)]
        if averaging:
            rank_zero_warn(
                f"FedFisherCallback stands before {type(averaging[0]).__name__} and would extract "
                "the weights before they are averaged: place it after"
            )
        twins = [c for c in callbacks if isinstance(c, FedFisherCallback) and c is not self]
        if any(twin._client.output == self._client.output for twin in twins):
            raise ValueError(
                "two FedFisherCallbacks would write the same file "
                f"({self._client.output or 'default'}): give each its own output"
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Refused before the hours of training rather than after them.
        warn_of_used_runs(trainer.loggers)
        self._client.begin(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # A stream may not start anew: its first batch is rehearsed when it comes.
        if not self._client.rehearsed:
            self._client.rehearse(trainer, pl_module, batch)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._client.stepped:  # from now on there are graphs, hooks, an optimizer's state
            self._client.stepped = True
            self._client.rehearse(trainer, pl_module, batch)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: nn.Module = pl_module
        try:
            module = self._client.end(pl_module)
            self._send(trainer, module)
        except Exception as error:  # whatever it is, hours of training are not lost with it
            error.add_note(self._client.save_weights(trainer, module))
            raise
        self._sent_by_fit = True

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._sends_at(trainer.state.fn):
            self._client.require_writable(trainer)  # before the validation rather than after it
            self._client.loader(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._sends_at(trainer.state.fn):
            self._send(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._sends_at(trainer.state.fn):
            self._client.require_writable(trainer)
            self._client.loader(trainer)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._sends_at(trainer.state.fn):
            self._send(trainer, pl_module)

    def _sends_at(self, stage: str | None) -> bool:
        """Whether an update is due at the end of a validation or a prediction."""
        here = stage in (TrainerFn.VALIDATING, TrainerFn.PREDICTING)
        return here and bool(self._client.closed_form_head) and not self._sent_by_fit

    @torch.inference_mode(False)  # or what is sent would be of no use outside of it
    def _send(self, trainer: Trainer, module: nn.Module) -> None:
        """Extracts the update and writes it."""
        dry = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        one_batch = getattr(self._client.loader(trainer), "batch_size", None) or 1
        most = self._client.options.max_samples
        if self._client.num_samples and most == "auto":
            # What an iterable cannot tell.
            most = most_samples(most, self._client.num_samples)
        tell = None if dry else progress_log(trainer.loggers, self._prefix(trainer))
        extracted = self._client.extract(trainer, module, one_batch if dry else most, tell)
        logs = not dry and trainer.is_global_zero and bool(trainer.loggers)
        curvature = self._describe(trainer, extracted) if logs else []
        update = self._client.update_of(module, extracted)
        # Their memory is free as they are rounded.
        extracted = replace(extracted, blocks={}, fitted=None)
        if self._client.upload_budget is not None:
            update = update.compressed(self._client.upload_budget, consume=True)
        self.update, self.seconds = update, extracted.seconds
        if not dry:
            self._write(trainer, self.update)
        if logs:
            self._log(trainer, extracted, curvature)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.update is None:
            if trainer.train_dataloader is not None:
                partition_samples(self._client.loader(trainer))  # an empty client is an error
            rank_zero_warn(
                "FedFisherCallback extracted nothing, because not one batch was trained (a "
                "finished checkpoint was resumed, max_epochs=0 or limit_train_batches=0): call "
                "extract_curvature on the module instead"
            )

    def _write(self, trainer: Trainer, update: ClientUpdate) -> None:
        path = self._client.path(trainer)

        def save() -> Path:
            return update.save(path if self._client.output else path_beside_others(path, update))

        self.path = on_rank_zero(trainer, save)
        rank_zero_info(f"FedFisherCallback wrote {self.path}")

    def _describe(self, trainer: Trainer, extracted: ExtractedCurvature) -> list[CurvatureSummary]:
        """Describes the curvature of each layer, for the loggers."""
        if self._client.options.curvature == "identity":  # which says nothing
            return []
        # Of several callbacks' curvature, one has its eigenvalues shown.
        spectrum = self._prefix(trainer) == keys.CLIENT_PREFIX
        return [summarize_curvature(n, b, spectrum=spectrum) for n, b in extracted.blocks.items()]

    def _log(
        self,
        trainer: Trainer,
        extracted: ExtractedCurvature,
        curvature: Sequence[CurvatureSummary],
    ) -> None:
        assert self.update is not None
        assert self.path is not None
        written = copy(self.update)  # the same tensors, under the name of the file
        written.source = str(self.path)
        metrics = {
            keys.EXTRACTION_SECONDS: extracted.seconds,
            keys.CURVATURE_SAMPLES: float(extracted.num_samples),
            keys.UPLOAD_BYTES: float(self.path.stat().st_size),
        }
        prefix = self._prefix(trainer)
        # LightningModule.log is closed at this point of a fit; the loggers are not.
        log_update(trainer.loggers, prefix, written, curvature, metrics, trainer.global_step)

    def _prefix(self, trainer: Trainer) -> str:
        """The start of all logged names: further callbacks beside the first have their own."""
        first = next(c for c in _callbacks(trainer) if isinstance(c, FedFisherCallback))
        options = self._client.options
        own = keys.join(keys.CLIENT_PREFIX, f"{options.curvature}-{options.fisher}")
        return keys.CLIENT_PREFIX if first is self else own


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks
