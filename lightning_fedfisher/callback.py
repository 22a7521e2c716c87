"""FedFisherCallback: extracts a client's update at the end of `Trainer.fit` and writes it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.curvature.summary import summarize_curvature
from lightning_fedfisher.distributed.strategies import require_whole_model
from lightning_fedfisher.extraction.batches import Forward
from lightning_fedfisher.extraction.extract import (
    ExtractedCurvature,
    check_options,
    extract_curvature,
)
from lightning_fedfisher.extraction.fisher_types import FisherType, LikelihoodType
from lightning_fedfisher.extraction.layer_report import CurvatureType
from lightning_fedfisher.extraction.sampling import (
    MaxSamples,
    Shard,
    check_max_samples,
    most_samples,
    partition_samples,
)
from lightning_fedfisher.layers import find_layers
from lightning_fedfisher.tracking.client import log_update, progress_log, warn_of_used_runs
from lightning_fedfisher.update.client_update import ClientUpdate

_PREFIX = "fedfisher"
# Two at least, so that a sample whose logits depend on another is noticed.
_REHEARSED = 2


class FedFisherCallback(Callback):
    """Turns a finished fit into a `ClientUpdate`: the weights and the curvature around them.

    With no arguments it works: once the training ends, normally or early, it extracts the curvature
    over every twelfth training sample (at least 300), each once, and rank 0 writes
    ``<log dir or default_root_dir>/fedfisher/update.safetensors``. Before the training it rehearses
    that on two samples, so that what cannot be extracted is refused at once. Weights, gradients,
    modes and random states stay as they are. After an exception or Ctrl-C nothing is written; under
    ``fast_dev_run`` one batch is extracted and nothing written.

    Example::

        trainer = Trainer(callbacks=[FedFisherCallback()])
        trainer.fit(module, train_loader)

    Attributes:
        update: the update as it is sent; None until the fit has ended.
        path: the file written; None until then.
        seconds: wall-clock time the extraction took; None until then.
    """

    def __init__(
        self,
        output: str | os.PathLike[str] | None = None,
        *,
        curvature: CurvatureType = "kfac",
        fisher: FisherType = "normalised",
        likelihood: LikelihoodType = "categorical",
        max_samples: MaxSamples = "auto",
        batch_size: int | None = None,
        dataloader: Iterable[Any] | None = None,
        num_samples: int | None = None,
        forward: Forward | None = None,
        draws: int = 1,
        seed: int = 0,
        upload_budget: float | None = 1.0,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Checks the options; see `extract_curvature` for those not told here.

        Args:
            output: file to write; under the trainer's log directory if None.
            curvature: kind of curvature; ``"identity"`` sends the weights alone.
            fisher: Fisher type.
            likelihood: of the labels given the logits.
            max_samples: average over a seeded random subset of this size; ``"auto"`` takes every
                twelfth sample but no fewer than 300, None takes all.
            batch_size: samples a batch; the loader's own if None.
            dataloader: the client's samples, if not those behind the training loader, for example
                without its augmentation.
            num_samples: training samples the client holds, its weight in the merge; counted if
                None, which takes a map-style data set.
            forward: maps ``(module, batch)`` to logits, or ``(logits, labels)``; needed where
                batches are not ``(x, y)`` or the module's output is not its logits.
            draws: directions a sample for the Fisher types that draw.
            seed: of the subset and of the Monte-Carlo draws.
            upload_budget: most bytes of the file, in multiples of what FedAvg sends; weights and
                curvature are rounded to fit (see `ClientUpdate.compressed`). None rounds nothing.
                Updates of up to 16 KiB are never rounded.
            metadata: anything to send along, as strings.

        Raises:
            ValueError: if an option is unknown or out of range.
        """
        check_options(curvature, fisher, likelihood)
        check_max_samples(max_samples)
        counts = {"num_samples": num_samples, "batch_size": batch_size, "draws": draws}
        for name, value in counts.items():
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
        if upload_budget is not None and not 0 < upload_budget < math.inf:
            raise ValueError(f"upload_budget must be greater than 0, got {upload_budget!r}")
        for item in (metadata or {}).items():
            if not all(isinstance(part, str) for part in item):
                raise ValueError(f"metadata must map strings to strings, got {item}")
        self._output = None if output is None else Path(output)
        self._curvature: CurvatureType = curvature
        self._fisher: FisherType = fisher
        self._likelihood: LikelihoodType = likelihood
        self._max_samples = max_samples
        self._batch_size = batch_size
        self._dataloader = dataloader
        self._num_samples = num_samples
        self._forward = forward
        self._draws = draws
        self._seed = seed
        self._upload_budget = upload_budget
        self._metadata = dict(metadata or {})
        self.update: ClientUpdate | None = None
        self.path: Path | None = None
        self.seconds: float | None = None

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            output=str(self._output), curvature=self._curvature, fisher=self._fisher
        )

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.update = self.path = self.seconds = None
        require_whole_model(trainer, "FedFisherCallback")
        if self._output is not None and self._output.is_dir():
            raise ValueError(f"output={self._output} is a folder: name a file in it")
        callbacks = _callbacks(trainer)
        later = callbacks[callbacks.index(self) + 1 :]
        averaging = [c for c in later if isinstance(c, WeightAveraging | StochasticWeightAveraging)]
        if averaging:
            rank_zero_warn(
                f"FedFisherCallback stands before {type(averaging[0]).__name__} and would extract "
                "the weights before they are averaged: place it after"
            )
        twins = [c for c in callbacks if isinstance(c, FedFisherCallback) and c is not self]
        if any(twin._output == self._output for twin in twins):
            raise ValueError(
                f"two FedFisherCallbacks would write the same file ({self._output or 'default'}): "
                "give each its own output"
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Refused before the hours of training rather than after them.
        loader = self._loader(trainer)
        counted = partition_samples(loader, shard=_shard(trainer)).population is not None
        bounded = self._max_samples is not None or self._curvature == "identity"
        if not counted and not (bounded and self._num_samples):
            raise ValueError(
                "samples of an iterable cannot be counted, and it may have no end: pass "
                "num_samples= (what the client holds), and leave max_samples= a number or 'auto'"
            )
        find_layers(pl_module)
        warn_of_used_runs(trainer.loggers)
        if counted:  # a rehearsal; an iterable might not start anew
            rehearsed = self._extract(trainer, pl_module, max_samples=_REHEARSED)
            self._update_of(pl_module, rehearsed)
            rank_zero_info(f"FedFisherCallback will extract\n{rehearsed.report}")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        dry = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        one_batch = getattr(self._loader(trainer), "batch_size", None) or 1
        most = self._max_samples
        if self._num_samples and most == "auto":
            # What an iterable cannot tell.
            most = most_samples(most, self._num_samples)
        tell = None if dry else progress_log(trainer.loggers, self._prefix(trainer))
        extracted = self._extract(trainer, pl_module, one_batch if dry else most, tell)
        self.update = self._update_of(pl_module, extracted)
        self.seconds = extracted.seconds
        if not dry:
            self._write(trainer, self.update)
            self._log(trainer, extracted)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.update is None:
            if trainer.train_dataloader is not None:
                partition_samples(self._loader(trainer))  # an empty client is an error
            rank_zero_warn(
                "FedFisherCallback extracted nothing, because not one batch was trained (a "
                "finished checkpoint was resumed, max_epochs=0 or limit_train_batches=0): call "
                "extract_curvature on the module instead"
            )

    def _loader(self, trainer: Trainer) -> Iterable[Any]:
        loader = self._dataloader if self._dataloader is not None else trainer.train_dataloader
        if loader is None or isinstance(loader, Mapping | list | tuple):
            raise ValueError(
                "several training loaders, or none: pass FedFisherCallback(dataloader=...) the one "
                "over this client's samples"
            )
        return loader

    def _extract(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        max_samples: MaxSamples,
        on_progress: Callable[[int, int | None], None] | None = None,
    ) -> ExtractedCurvature:
        return extract_curvature(
            pl_module,
            self._loader(trainer),
            self._curvature,
            fisher=self._fisher,
            likelihood=self._likelihood,
            max_samples=max_samples,
            batch_size=self._batch_size,
            seed=self._seed,
            draws=self._draws,
            forward=self._forward,
            prepare=trainer.strategy.batch_to_device,
            shard=_shard(trainer),
            progress=trainer.progress_bar_callback is not None,
            on_progress=on_progress,
        )

    def _update_of(self, pl_module: LightningModule, extracted: ExtractedCurvature) -> ClientUpdate:
        header = extracted.header(self._num_samples, self._metadata)
        update = ClientUpdate.from_model(pl_module, header, extracted.blocks)
        return update if self._upload_budget is None else update.compressed(self._upload_budget)

    def _write(self, trainer: Trainer, update: ClientUpdate) -> None:
        # Asked on every rank: the log directory is broadcast.
        folder = trainer.log_dir or trainer.default_root_dir
        self.path = self._output or Path(folder) / "fedfisher" / "update.safetensors"
        if trainer.is_global_zero:
            update.save(self.path)
        trainer.strategy.barrier("FedFisherCallback.write")
        rank_zero_info(f"FedFisherCallback wrote {self.path}")

    def _log(self, trainer: Trainer, extracted: ExtractedCurvature) -> None:
        if not trainer.is_global_zero or self.path is None or not trainer.loggers:
            return
        written = ClientUpdate.open(self.path)
        metrics = {
            "extraction_seconds": extracted.seconds,
            "curvature_samples": float(extracted.num_samples),
            "upload_bytes": float(written.upload_bytes),
        }
        prefix = self._prefix(trainer)
        curvature = []
        if self._curvature != "identity":  # which says nothing
            # Of several callbacks' curvature, one has its eigenvalues shown.
            describe = partial(summarize_curvature, spectrum=prefix == _PREFIX)
            curvature = [describe(name, block) for name, block in extracted.blocks.items()]
        # LightningModule.log is closed at this point of a fit; the loggers are not.
        log_update(trainer.loggers, prefix, written, curvature, metrics, trainer.global_step)

    def _prefix(self, trainer: Trainer) -> str:
        """Of what is logged: further callbacks beside the first have names of their own."""
        first = next(c for c in _callbacks(trainer) if isinstance(c, FedFisherCallback))
        return _PREFIX if first is self else f"{_PREFIX}/{self._curvature}-{self._fisher}"


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _shard(trainer: Trainer) -> Shard:
    def total(tensor: Tensor) -> Tensor:
        reduced = trainer.strategy.reduce(tensor, reduce_op="sum")
        assert isinstance(reduced, Tensor)
        return reduced

    return Shard(trainer.global_rank, trainer.world_size, total)
