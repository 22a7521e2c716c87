"""What a client sends at the end of its Trainer's fit, and the rehearsal of it before.

A mistake that shows after hours of training has cost them. So everything that will be done is done
before with a few samples: reading them as training does, copying the module, extracting, writing
the file where it will be, and reading it as a server does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.utils.data import DataLoader

from lightning_fedfisher._utils.files import require_writable
from lightning_fedfisher._utils.unwrapping import unwrapped
from lightning_fedfisher.distributed.failures import shared_failures
from lightning_fedfisher.distributed.lightning_batches import as_in_training, without_hooks
from lightning_fedfisher.distributed.lightning_strategies import on_rank_zero, sum_over_ranks
from lightning_fedfisher.distributed.processes import Shard
from lightning_fedfisher.extraction.closed_form_head import extract_closed_form_head
from lightning_fedfisher.extraction.extract import extract_curvature
from lightning_fedfisher.extraction.options import ExtractionOptions
from lightning_fedfisher.extraction.result import ExtractedCurvature
from lightning_fedfisher.extraction.sampling import MaxSamples, in_one_batch, partition_samples
from lightning_fedfisher.extraction.tracing.model_trace import ModelTrace
from lightning_fedfisher.extraction.unusual_samples import unusual_samples
from lightning_fedfisher.layers import find_layers
from lightning_fedfisher.update.client_update import ClientUpdate
from lightning_fedfisher.update.frozen import frozen_digests, with_changed_ones_trained
from lightning_fedfisher.update.writing_rehearsal import rehearse_writing

# Two at least, so that a sample whose logits depend on another is noticed.
_REHEARSED_SAMPLES = 2
_NAMED = 5  # frozen parameters in one warning


@dataclass
class ClientRun:
    """One client of a federation: its options, and what one fit has told so far.

    Attributes:
        options: Options of the extraction.
        closed_form_head: Whether to fit the last layer in place of extracting curvature, or the
            name of the layer to fit.
        dataloader: The client's samples; None takes those of the Trainer's loader.
        num_samples: Number of samples that the client holds; None counts them.
        metadata: Further text to send along.
        upload_budget: Most bytes of the file in multiples of what FedAvg sends; None for any.
        output: File to write; None puts it under the Trainer's log directory.
        trace: What the rehearsal learned of the module.
        rehearsed: Whether the extraction was rehearsed since the fit began.
        stepped: Whether a training step was made since then.
    """

    options: ExtractionOptions
    closed_form_head: bool | str
    dataloader: Iterable[Any] | None
    num_samples: int | None
    metadata: Mapping[str, str]
    upload_budget: float | None
    output: Path | None
    trace: ModelTrace | None = None
    rehearsed: bool = False
    stepped: bool = False
    _frozen: dict[str, str] = field(default_factory=dict)
    _layers: tuple[str, ...] = ()

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses what can be refused before the first batch of a fit.

        Args:
            trainer: The running Trainer.
            pl_module: Its module.

        Raises:
            ValueError: If samples, model, labels or output are not fit for use.
        """
        self.require_writable(trainer)
        shard = Shard(trainer.global_rank, trainer.world_size)
        counted = partition_samples(self.loader(trainer), shard=shard).population is not None
        bounded = self.options.max_samples is not None or self.options.curvature == "identity"
        if not counted and not (bounded and self.num_samples):
            raise ValueError(
                "samples of an iterable cannot be counted, and it may have no end: pass "
                "num_samples= (what the client holds), and a number as max_samples="
            )
        find_layers(unwrapped(pl_module))
        self._tell_of_batches_left_out(trainer)
        self.trace, self.rehearsed, self.stepped = None, False, False
        self._frozen = frozen_digests(pl_module)
        if counted:
            self.rehearse(trainer, pl_module)

    def _tell_of_batches_left_out(self, trainer: Trainer) -> None:
        """Warns where the Trainer sees some batches of its loader alone, and the client has all."""
        limit = trainer.limit_train_batches
        some = limit not in (None, 1.0) or trainer.overfit_batches  # type: ignore[attr-defined]
        dry = trainer.fast_dev_run  # type: ignore[attr-defined]
        if some and self.dataloader is None and not dry:
            rank_zero_warn(
                "the Trainer leaves batches out (limit_train_batches or overfit_batches), and "
                "curvature and number of samples are of the whole loader: pass dataloader= one "
                "over the samples that are trained on"
            )

    def end(self, pl_module: LightningModule) -> nn.Module:
        """Gives the module to send: what changed in it counts as trained, frozen or not.

        Args:
            pl_module: The Trainer's module, which is not changed.

        Returns:
            A module that shares its values.
        """
        module, changed = with_changed_ones_trained(pl_module, self._frozen)
        trained = tuple(layer.name for layer in find_layers(module))
        if trained != self._layers:
            self.trace = None  # which is of others
        if changed:
            more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
            rank_zero_warn(
                f"frozen parameters changed during the training: {', '.join(changed[:_NAMED])}"
                f"{more}. They are sent as trained ones are; what no gradient reaches is averaged"
            )
        return module

    def rehearse(self, trainer: Trainer, pl_module: LightningModule, batch: Any = None) -> None:
        """Extracts from a few samples and writes the update for a trial, to refuse early.

        Args:
            trainer: The running Trainer.
            pl_module: Its module.
            batch: A training batch, for a loader that cannot be read now; it is on the device.
        """
        self.rehearsed = True
        loader = self.loader(trainer)
        prepare: Callable[[Any], Any] | None = self._prepare(trainer, pl_module)
        indices = unusual_samples(loader, _REHEARSED_SAMPLES)
        if indices is not None:
            assert isinstance(loader, DataLoader)
            loader = in_one_batch(loader, indices, self.options.seed)
        elif self.dataloader is None:
            loader, prepare = [batch], None
        elif isinstance(loader, Iterator):
            return  # which has its samples once
        self.trace = None  # an earlier one knows nothing of what a training step has changed
        most = _REHEARSED_SAMPLES if indices is None else None
        rehearsed = self._run(trainer, pl_module, most, loader, prepare)
        update = self.update_of(pl_module, rehearsed)
        self.trace = rehearsed.trace  # which spares another one after the training
        self._layers = tuple(layer.name for layer in rehearsed.layers)
        if self.stepped:
            return  # all else is as it was at the start
        if self.upload_budget is not None:
            update.require_room(self.upload_budget)
        path = self.path(trainer)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            on_rank_zero(trainer, partial(rehearse_writing, update, path))
        rank_zero_info(f"FedFisherCallback will extract\n{rehearsed.report}")

    def extract(
        self,
        trainer: Trainer,
        module: nn.Module,
        max_samples: MaxSamples,
        on_progress: Callable[[int, int | None], None] | None = None,
    ) -> ExtractedCurvature:
        """Extracts what will be sent.

        Args:
            trainer: The running Trainer.
            module: The module to send, from `end`.
            max_samples: Most samples to average over.
            on_progress: See `extract_curvature`.

        Returns:
            What was extracted.
        """
        prepare = self._prepare(trainer, trainer.lightning_module)
        return self._run(trainer, module, max_samples, self.loader(trainer), prepare, on_progress)

    def save_weights(self, trainer: Trainer, module: nn.Module) -> str:
        """Writes what was trained as an update without curvature, where curvature cannot be had.

        Args:
            trainer: The running Trainer.
            module: The module to send, from `end`.

        Returns:
            Where it is and what to do with it, or why it could not be written.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return "Nothing is written under fast_dev_run"
        path = self.path(trainer)
        path = path.with_name(f"{path.stem}.weights{path.suffix}")
        if trainer.is_global_zero:
            try:
                weights = extract_curvature(module, self.loader(trainer), "identity")
                header = weights.header(self.num_samples or weights.population or 1, self.metadata)
                ClientUpdate.from_model(module, header, weights.blocks).save(path)
            except Exception as error:  # told beside the first one, whose note this is
                return f"The trained weights could not be written either: {error}"
        return (
            f"The trained weights are in {path}, an update without curvature: load its parameters "
            "into the module, and call extract_curvature on it once the cause is mended"
        )

    def loader(self, trainer: Trainer) -> Iterable[Any]:
        """Gives the client's samples.

        Args:
            trainer: The running Trainer.

        Returns:
            The loader that the user gave, or the Trainer's.

        Raises:
            ValueError: If the Trainer has several, or none.
        """
        own: dict[TrainerFn | None, Any] = {
            TrainerFn.VALIDATING: trainer.val_dataloaders,
            TrainerFn.PREDICTING: trainer.predict_dataloaders,
        }
        found = own.get(trainer.state.fn, trainer.train_dataloader)
        if isinstance(found, list) and len(found) == 1:
            (found,) = found
        loader = found if self.dataloader is None else self.dataloader
        several = self.dataloader is None and isinstance(loader, Mapping | list | tuple)
        if loader is None or several:
            raise ValueError(
                "several loaders, or none: pass FedFisherCallback(dataloader=...) the one "
                "over this client's samples"
            )
        return loader

    def _run(
        self,
        trainer: Trainer,
        module: nn.Module,
        max_samples: MaxSamples,
        loader: Iterable[Any],
        prepare: Callable[[Any], Any] | None,
        on_progress: Callable[[int, int | None], None] | None = None,
    ) -> ExtractedCurvature:
        options = replace(self.options, max_samples=max_samples)
        head = self.closed_form_head if isinstance(self.closed_form_head, str) else None
        extract = (
            partial(extract_closed_form_head, head=head)
            if self.closed_form_head
            else partial(extract_curvature, trace=self.trace)
        )
        with shared_failures(partial(sum_over_ranks, trainer)) as total:
            return extract(
                module,
                loader,
                options=options,
                prepare=prepare,
                shard=Shard(trainer.global_rank, trainer.world_size, total),
                progress=trainer.progress_bar_callback is not None,
                on_progress=on_progress,
            )

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> Callable[[Any], Any]:
        """What happens to a batch before the module sees it; hooks are for training batches."""
        as_usual = as_in_training if self.dataloader is None else without_hooks
        return as_usual(trainer, pl_module)

    def update_of(self, module: nn.Module, extracted: ExtractedCurvature) -> ClientUpdate:
        """Gives the update of what was extracted.

        Args:
            module: The module to send.
            extracted: What was extracted from it.

        Returns:
            The update, in memory.
        """
        header = extracted.header(self.num_samples, self.metadata)
        model = module if extracted.fitted is None else extracted.fitted
        return ClientUpdate.from_model(model, header, extracted.blocks, extracted.statistics)

    def path(self, trainer: Trainer) -> Path:
        """Names the file to write; to be asked on every rank, as the log directory is broadcast.

        Args:
            trainer: The running Trainer.

        Returns:
            Its path.
        """
        folder = trainer.log_dir or trainer.default_root_dir
        return self.output or Path(folder) / "fedfisher" / "update.safetensors"

    def require_writable(self, trainer: Trainer) -> None:
        """Refuses an output that cannot be written, on every rank.

        Args:
            trainer: The running Trainer.

        Raises:
            OSError: If it cannot be written.
        """
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            on_rank_zero(trainer, partial(require_writable, self.path(trainer)))
