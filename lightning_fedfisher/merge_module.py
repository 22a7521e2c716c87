"""FisherMergeModule: the server on a Lightning Trainer.

The merge is a separate problem for each layer, so a `Trainer` runs it with the parts it has: the
train loader yields this rank's layers, a training step advances one layer's solver, and at the end
of each epoch the ranks put the global model together. Nothing is exchanged in between. All that the
server knows of merging is in `lightning_fedfisher.merge`, which needs no Trainer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any, cast

from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_fedfisher._utils.text import client_names
from lightning_fedfisher._utils.unwrapping import unwrapped
from lightning_fedfisher.distributed.assignment import IDLE, LayerBatches, assign_layers
from lightning_fedfisher.distributed.failures import raise_together
from lightning_fedfisher.distributed.lightning_strategies import require_whole_model, sum_over_ranks
from lightning_fedfisher.merge.checkpoint import fingerprint, load_state, save_state
from lightning_fedfisher.merge.compatibility import UpdateSource
from lightning_fedfisher.merge.memory_budget import DEFAULT_MEMORY_BUDGET
from lightning_fedfisher.merge.merger import Merger
from lightning_fedfisher.merge.methods import MergeMethod
from lightning_fedfisher.merge.options import MergeOptions
from lightning_fedfisher.merge.result import MergeResult
from lightning_fedfisher.merge.validation import Validation, require_one_loader
from lightning_fedfisher.tracking.server import define_merge_axes, layer_metrics, log_merge

_CHECKPOINT_KEY = "lightning_fedfisher_merge"


class FisherMergeModule(LightningModule):
    """Merges client updates into one model on a Lightning `Trainer`.

    It stops the trainer by itself once every layer is solved, so ``max_epochs=-1`` is right. Under
    ``strategy="ddp"`` ranks own whole layers, assigned by cost, and the result does not depend on
    their number. A merge resumed from a checkpoint (``Trainer.fit(merge, ckpt_path=...)``) keeps
    the layers that were solved, and ends in the same model. `merge_updates` does the same in one
    process without a Trainer.

    After every epoch it logs ``objective``, ``residual`` (the largest of any layer) and
    ``iterations`` (the most of any layer), and both for each layer as ``residual/NAME`` and
    ``iterations/NAME``. With a validation loader of ``(x, y)`` batches and a `model`, the scores of
    the global model are logged as well: ``val_nll``, and ``val_accuracy`` where the clients'
    likelihood has one.

    Attributes:
        updates: The opened updates, in the order given.
        layers: The layers of the clients' model.
        method: Name of the merge method.
        merger: The merge itself, as it stands.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> merge = FisherMergeModule(["a.safetensors", "b.safetensors"])  # doctest: +SKIP
        >>> Trainer(max_epochs=-1).fit(merge)  # doctest: +SKIP
        >>> torch.save(merge.merged_state_dict(), "merged.pt")  # doctest: +SKIP
    """

    def __init__(
        self,
        updates: Sequence[UpdateSource],
        *,
        model: nn.Module | None = None,
        statistics_loader: Iterable[Any] | None = None,
        method: str | MergeMethod = "fedfisher",
        keep_best: bool | None = None,
        max_iterations: int | None = None,
        max_influence: float | None = None,
        skip_invalid: bool = False,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        allow_duplicates: bool = False,
    ) -> None:
        """Opens and checks all updates.

        Args:
            updates: Update files or `ClientUpdate` objects, one for each client.
            model: A model that is loaded with the result when the fit ends, and that validation
                and the statistics loader run; None if there is no need for any of these.
            statistics_loader: Batches of inputs, labels or not, on which the running statistics of
                the merged model's BatchNorm layers are estimated, alike on every rank; None merges
                those of the clients.
            method: Name of the merge method, a key of `METHODS`, or a row of your own.
            keep_best: Whether to return the iterate that is best on the validation loader rather
                than the last one. None leaves that to the method: the published ones do.
            max_iterations: Solver steps to make for a layer at most; the method's own if None.
            max_influence: What a client may weigh in a layer, as a multiple of what the median
                client weighs (see `influence_cap`). None leaves that to the method: 2 for ours, no
                bound for the published ones.
            skip_invalid: Whether to merge without the updates that would be refused, and warn.
            memory_budget: Bytes of clients' weights and curvature to hold at a time. Beyond it,
                layers wait for their turn, and what exceeds it alone is offloaded to disk. Where
                the best iterate is looked for on a validation loader, all layers move at once, and
                it bounds each of them, not their sum.
            allow_duplicates: Whether an update that is there twice, to the digest, counts twice. It
                counts once otherwise, with a warning.

        Raises:
            MergeError: If updates are missing, corrupt, of different models, or without the
                curvature that the method needs; all are named.
            ValueError: If an option is out of range or the model does not fit the updates.
        """
        super().__init__()
        self.automatic_optimization = False
        options = MergeOptions(
            method,
            keep_best,
            max_iterations,
            max_influence,
            skip_invalid,
            memory_budget,
            allow_duplicates,
        )
        self.merger = Merger.open(updates, options, model, statistics_loader)
        self.updates, self.layers = self.merger.updates, self.merger.layers
        self.method, self.max_influence = options.row.name, options.row.max_influence
        # Parameters, so that checkpoints hold them and DDP takes the module. Buffers or submodules
        # would be overwritten by rank 0's, so the model stays outside the module tree.
        self.merged = nn.ParameterList(nn.Parameter(matrix) for matrix in self.merger.merged)
        self.merger.merged = cast(Sequence[Tensor], self.merged)  # whatever replaces its parameters
        # Whoever takes the state finds the average in layers that no solver has begun; and whoever
        # puts one in its place means it.
        self.register_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            lambda *_: self.merger.fill()
        )
        self.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            lambda *_: self.merger.unread.clear()
        )
        self._target: list[nn.Module] = [] if model is None else [model]
        self._validation: Validation | None = None
        self._turns = 0
        self._ended = False
        self._failed: Exception | None = None
        self._started = 0.0

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.merger.method, self.updates, self.merger.loader.keeps_means)

    @property
    def result(self) -> MergeResult:
        """The merged model and how it came about, as the merge stands."""
        return self.merger.result()

    def merged_state_dict(self) -> dict[str, Tensor]:
        """The merged parameters and buffers by name, as the clients named them.

        Returns:
            Tensors on the CPU, in the clients' own dtypes; the clients' average before the fit.
            Parameters that the clients had frozen are not among them: the model brings its own.
        """
        return {name: tensor.cpu() for name, tensor in self.merger.state_dict().items()}

    @property
    def distances(self) -> Tensor:
        """How far each layer was moved from each client, in the client's own Fisher norm.

        Returns:
            ``<W - W_k, F_k (W - W_k)>^(1/2)`` with the curvature as merged, of shape
            ``(layers, clients)``; zeros for layers that are not done.
        """
        return self.merger.distances

    @property
    def influence(self) -> Tensor:
        """What each client weighs in each layer, as multiples of what the median client weighs.

        Returns:
            Its information, distance and pull (see `influence_cap`), of shape
            ``(layers, clients, 3)``.
        """
        return self.merger.influence

    @property
    def history(self) -> list[dict[str, float]]:
        """For each epoch ``iterations``, ``objective``, ``residual`` and the validation scores."""
        return self.merger.history

    @property
    def server_labels(self) -> int:
        """Number of labelled samples that decided which iterate is returned."""
        return self.merger.server_labels

    @override
    def setup(self, stage: str) -> None:
        require_whole_model(self.trainer, "FisherMergeModule")
        if self.trainer.precision != "32-true":
            raise ValueError(
                f"a merge needs full precision, got precision={self.trainer.precision!r}: "
                'use Trainer(precision="32-true")'
            )
        if stage == TrainerFn.FITTING:
            self._ended = False
            self._failed = None
            self._started = time.perf_counter()
            self.merger.restart()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[_CHECKPOINT_KEY] = save_state(self.merger, self._fingerprint)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        load_state(self.merger, checkpoint.get(_CHECKPOINT_KEY, {}), self._fingerprint)

    @override
    def configure_optimizers(self) -> Optimizer:
        return _EpochCounter(self.merged)

    @override
    def train_dataloader(self) -> LayerBatches:
        shapes = [layer.shape for layer in self.layers]
        assigned = assign_layers(shapes, self.trainer.world_size)
        self._turns = max(map(len, assigned))
        return LayerBatches(assigned[self.trainer.global_rank], self._turns)

    @override
    def on_train_start(self) -> None:
        if self.trainer.num_training_batches < self._turns:
            raise ValueError(
                "an epoch takes every layer, and limit_train_batches or fast_dev_run cuts it "
                "short: leave them out"
            )
        define_merge_axes(self.trainer.loggers)
        self.merger.move_to(self.device)
        if self.trainer.world_size > 1:
            self.merger.prepare(self.trainer.global_rank, self.trainer.world_size)

    @override
    def on_validation_start(self) -> None:
        if not self._target:
            raise ValueError("a validation loader needs a model to run: pass model=...")
        require_one_loader(self.trainer.val_dataloaders)
        self.merger.move_to(self.device)
        self.merger.refresh_statistics()
        # A new one each time: it may have been on another device, and a metric that was reset in
        # inference mode could not be updated outside it.
        state, likelihood = self.merger.state_dict(), self.merger.likelihood
        self._validation = Validation(self._target[0], state, likelihood, self.device)

    @override
    def training_step(self, batch: int, batch_idx: int) -> None:
        if batch != IDLE and self._failed is None:
            # A method that looks for its best iterate moves all layers at once.
            judged = self.merger.method.keeps_best and self.trainer.enable_validation
            try:
                self.merger.advance(batch, at_once=bool(judged))
            except Exception as error:  # told where the ranks meet, or the others would wait
                self._failed = error
        if batch_idx + 1 == self._turns:
            failed, self._failed = self._failed, None
            try:
                raise_together(failed)
            except Exception:
                self.merger.release()  # nothing of a merge that failed stays on the disk
                raise
            optimizer = self.optimizers()
            assert not isinstance(optimizer, list)
            optimizer.step(self._finish_epoch)

    @override
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        assert self._validation is not None
        self._validation.update(batch)

    @override
    def on_validation_epoch_end(self) -> None:
        assert self._validation is not None
        scores, samples = self._validation.compute()
        self._validation = None
        if self.trainer.sanity_checking:
            return
        self.log_dict(scores, prog_bar=True, batch_size=1, sync_dist=True)
        # Before the first epoch is complete, or outside a fit, there is nothing to choose from.
        if self.history and self.trainer.state.fn == TrainerFn.FITTING:
            self.merger.judge(scores, samples)

    @override
    def on_train_epoch_end(self) -> None:
        self.trainer.should_stop = self.trainer.should_stop or self.merger.done

    @override
    def on_fit_end(self) -> None:
        # A fit resumed with no epoch left to run has no end of training.
        if not self._ended:
            self.on_train_end()

    @override
    def on_train_end(self) -> None:
        self._ended = True
        self.merger.take_best()
        self.merger.refresh_statistics()
        self.merger.seconds = time.perf_counter() - self._started
        clients = client_names([update.source for update in self.updates])
        layers, step = [layer.name for layer in self.layers], self.trainer.global_step
        log_merge(self.trainer.loggers, layers, clients, self.distances, self.influence, step)
        for warning in self.merger.warnings:
            rank_zero_warn(warning)
        self.merger.release()
        if self._target:
            # What is missing are parameters that no client trained; they stay.
            unwrapped(self._target[0]).load_state_dict(self.merged_state_dict(), strict=False)

    def _finish_epoch(self) -> None:
        self.merger.finish_epoch(partial(sum_over_ranks, self.trainer))
        log = partial(self.log_dict, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        log(self.history[-1], prog_bar=True)
        if self.loggers:  # each of many names costs as much as a small layer
            log(layer_metrics([layer.name for layer in self.layers], self.merger.states))


class _EpochCounter(Optimizer):
    """An optimizer that runs the closure it is given, so that Lightning counts epochs as steps.

    Checkpoints, loggers and progress bars go by that count, and it must be the same on every rank.
    """

    def __init__(self, parameters: nn.ParameterList) -> None:
        super().__init__(list(parameters), {})

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return None if closure is None else closure()
