"""FisherMergeModule: the server. Batches are layers, epochs are sweeps of the solvers.

The merge is a separate problem for each layer, so a Lightning `Trainer` runs it with the parts it
has: the train loader yields this rank's layers, a training step advances one layer's solver, and at
the end of each sweep the ranks put the global model together. Nothing is exchanged in between. With
a method that aligns, a layer is begun once the layer whose outputs it reads is solved.

Memory is bounded by a budget: a layer is not begun while those in work leave no room for it, and
one that is too large by itself is worked on from disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_fedfisher._utils.text import client_names
from lightning_fedfisher.distributed.assignment import IDLE, Sweep, SweepCounter, deal
from lightning_fedfisher.distributed.strategies import require_whole_model
from lightning_fedfisher.merge import layer_state as layer_status
from lightning_fedfisher.merge.buffers import merge_buffers
from lightning_fedfisher.merge.checkpoint import fingerprint
from lightning_fedfisher.merge.compatibility import UpdateSource, check_model, open_updates
from lightning_fedfisher.merge.influence_cap import unusual
from lightning_fedfisher.merge.layer_loader import LayerProblems
from lightning_fedfisher.merge.layer_state import DONE
from lightning_fedfisher.merge.methods import METHODS, MergeMethod, MethodName
from lightning_fedfisher.merge.solvers import Solver
from lightning_fedfisher.merge.validation import Validation
from lightning_fedfisher.tracking.server import define_merge_axes, log_merge

_CHECKPOINT_KEY = "lightning_fedfisher_merge_2"  # counts what is saved


class FisherMergeModule(LightningModule):
    """Merges client updates into one model on a Lightning `Trainer`.

    Example::

        merge = FisherMergeModule(["client-0.safetensors", "client-1.safetensors"])
        Trainer(max_epochs=-1).fit(merge)
        torch.save(merge.merged_state_dict(), "merged.pt")

    It stops the trainer by itself once every layer is solved, so ``max_epochs=-1`` is right. Under
    ``strategy="ddp"`` ranks own whole layers, dealt by cost, and the result does not depend on
    their number. A merge resumed from a checkpoint (``Trainer.fit(merge, ckpt_path=...)``) keeps
    the layers that were solved, and ends in the same model.

    After every sweep it logs ``objective``, ``residual`` (the largest of any layer) and
    ``iterations`` (the most of any layer), and both for each layer as ``residual/NAME`` and
    ``iterations/NAME``.

    With a validation loader of ``(x, y)`` batches and a `model`, accuracy and negative
    log-likelihood of the global model are logged after every sweep.

    Attributes:
        updates: the opened updates, in the order given.
        problems: what is read of them: shares, an estimate of memory, each layer's problem.
        max_influence: what a client may weigh, as a multiple of what the median client does.
        influence: what each client weighs in each layer, as multiples of what the median client
            does: ``(layers, clients, 3)``, its information, distance and pull (see `influence`).
        history: one dictionary a sweep: ``iterations``, ``objective`` (of the layers begun),
            ``residual`` and, with a validation loader, ``val_accuracy`` (percent) and ``val_nll``.
    """

    def __init__(
        self,
        updates: Sequence[UpdateSource],
        *,
        model: nn.Module | None = None,
        method: MethodName | MergeMethod = "fedfisher",
        keep_best: bool | None = None,
        max_iterations: int | None = None,
        max_influence: float | None = None,
        skip_invalid: bool = False,
        memory_budget: int = 2**30,
    ) -> None:
        """Opens and checks all updates.

        Args:
            updates: update files or `ClientUpdate` objects, one for each client.
            model: loaded with the result when the fit ends, and used for validation; optional.
            method: name of the merge method, a key of `METHODS`, or a row of your own.
            keep_best: return the iterate best on the validation loader rather than the last one.
                As the method has it if None: the published methods do, ours does not.
            max_iterations: solver steps a layer at most; the method's own if None.
            max_influence: what a client may weigh in a layer, as a multiple of what the median
                client does (see `influence`). As the method has it if None: 10 for ours, infinite
                for the published ones. 2 resists clients that are hostile.
            skip_invalid: merge without the updates that would be refused, and warn of them.
            memory_budget: bytes of clients' curvature and weights to hold at a time; beyond it,
                layers wait for their turn, and the curvature of one that exceeds it alone is kept
                on disk, in the folder for temporary files, as are alignments. Where the best
                iterate is looked for on a validation loader, all layers move at once, and it
                bounds each of them, not their sum.

        Raises:
            MergeError: naming every update that is missing, corrupt, of another architecture, or
                without the curvature the method needs.
            ValueError: if the method is unknown or the model does not fit the updates.
        """
        super().__init__()
        if not isinstance(method, MergeMethod) and method not in METHODS:
            raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
        self.automatic_optimization = False
        self._method = method if isinstance(method, MergeMethod) else METHODS[method]
        self.method = "custom" if isinstance(method, MergeMethod) else method
        self._keep_best = self._method.keeps_best if keep_best is None else keep_best
        if max_iterations is not None and max_iterations < 1:
            raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
        self._max_iterations = max_iterations or self._method.iterations
        if max_influence is not None:
            if not max_influence >= 1:
                raise ValueError(f"max_influence must be at least 1, got {max_influence}")
            self._method = replace(self._method, max_influence=float(max_influence))
        self.max_influence = self._method.max_influence
        self.updates = open_updates(updates, self._method, self.method, skip_invalid)
        self.layers = self.updates[0].layers
        self.problems = LayerProblems(self.updates, self._method, memory_budget)
        # Parameters, so that checkpoints hold them and DDP takes the module. Buffers or submodules
        # would be overwritten by rank 0's, so the model stays outside the module tree.
        self.merged = nn.ParameterList(
            nn.Parameter(self.problems.average(layer)) for layer in self.layers
        )
        self._merged_buffers = merge_buffers(self.updates, self.max_influence)
        self._dtypes = {n: dtype for n, (_, dtype) in self.updates[0].specs.items()}
        self._target: list[nn.Module] = [] if model is None else [model]
        if model is not None:
            check_model(model, self.merged_state_dict(), self.updates[0].header.frozen)
        self._validation: Validation | None = None
        self._turns = 0
        self._forget()

    def _forget(self) -> None:
        """Starts a merge with nothing solved."""
        self.problems.forget()
        self._solvers: dict[int, Solver] = {}
        self._progress: dict[int, tuple[Tensor, list[float]]] = {}
        self._status = layer_status.waiting(len(self.layers), len(self.updates))
        self.influence = self.problems.weighed.clone()
        self._best: tuple[float, list[Tensor]] | None = None
        self.history: list[dict[str, float]] = []
        self._validation_samples = 0
        self._ended = False

    @cached_property
    def _fingerprint(self) -> str:  # when a checkpoint asks for it: it may hash all updates
        known = METHODS.get(cast(MethodName, self.method)) == self._method
        return fingerprint(self.method if known else self._method, self.updates)

    def merged_state_dict(self) -> dict[str, Tensor]:
        """The merged model: parameters and buffers by name, as the clients named them.

        Returns:
            Tensors on the CPU, in the clients' own dtypes. Before the fit, the average. Parameters
            that the clients had frozen are not among them: the model brings its own.
        """
        return {name: tensor.cpu() for name, tensor in self._state().items()}

    @property
    def distances(self) -> Tensor:
        """How far each layer was moved from each client, in the client's own Fisher norm.

        Returns:
            ``<W - W_k, F_k (W - W_k)>^(1/2)`` with the curvature as merged, where the layer's
            solver ended, ``(layers, clients)``; zero for layers that are not solved.
        """
        return self._status[:, layer_status.DISTANCES].clone()

    @property
    def server_labels(self) -> int:
        """Labelled samples that decided which iterate is returned."""
        return self._validation_samples if self._keep_best else 0

    @override
    def setup(self, stage: str) -> None:
        require_whole_model(self.trainer, "FisherMergeModule")
        if self.trainer.precision != "32-true":
            raise ValueError(
                f"a merge needs full precision, got precision={self.trainer.precision!r}: "
                'use Trainer(precision="32-true")'
            )
        if stage == TrainerFn.FITTING:
            self._forget()
            self._set_merged([self.problems.average(layer) for layer in self.layers])

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[_CHECKPOINT_KEY] = {
            "fingerprint": self._fingerprint,
            "status": self._status,
            "max_iterations": self._max_iterations,
            "history": self.history,
            "best": self._best,
            "validation_samples": self._validation_samples,
            "influence": self.influence,
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get(_CHECKPOINT_KEY, {})
        if saved.get("fingerprint") != self._fingerprint:
            raise ValueError(
                "the checkpoint is of another merge, or an earlier version's: resume it with the "
                "same updates, in the same order, and the same method"
            )
        self._status, self.history = saved["status"].cpu(), list(saved["history"])
        self.influence = saved["influence"].cpu()
        if saved["max_iterations"] != self._max_iterations:
            # What ended for want of iterations begins anew, with all that waits for it.
            ended = self._status[:, DONE] == layer_status.ENDED
            needs = map(self.problems.needs, range(len(self.layers)))
            self._status[[bool(ended[needed].any()) for needed in needs]] = 0
        self._best, self._validation_samples = saved["best"], saved["validation_samples"]

    @override
    def configure_optimizers(self) -> Optimizer:
        return SweepCounter(self.merged)

    @override
    def train_dataloader(self) -> Sweep:
        hands = deal([layer.shape for layer in self.layers], self.trainer.world_size)
        self._turns = max(map(len, hands))
        return Sweep(hands[self.trainer.global_rank], self._turns)

    @override
    def on_train_start(self) -> None:
        if self.trainer.num_training_batches < self._turns:
            raise ValueError(
                "a sweep takes every layer, and limit_train_batches or fast_dev_run cuts it short: "
                "leave them out"
            )
        define_merge_axes(self.trainer.loggers)
        ranks = self.trainer.world_size
        if ranks > 1:
            left = (self._status[:, DONE] == 0).nonzero().flatten().tolist()
            self.problems.prepare_all(left, self.trainer.global_rank, ranks, self.device)

    @override
    def on_validation_start(self) -> None:
        if not self._target:
            raise ValueError("a validation loader needs a model to run: pass model=...")
        loaders = self.trainer.val_dataloaders
        # A new one each time: it may have been on another device, and a metric that was reset in
        # inference mode could not be updated outside it.
        self._validation = Validation(self._target[0], self._state(), loaders, self.device)

    @override
    def training_step(self, batch: int, batch_idx: int) -> None:
        if batch != IDLE:
            self._advance(batch)
        if batch_idx + 1 == self._turns:
            optimizer = self.optimizers()
            assert not isinstance(optimizer, list)
            optimizer.step(self._gather)

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
        if not self.history or self.trainer.state.fn != TrainerFn.FITTING:
            return  # no sweep is complete, or this is no fit
        self._validation_samples = samples
        self.history[-1] |= scores
        accuracy = scores["val_accuracy"]
        if self._best is None or accuracy > self._best[0]:
            self._best = accuracy, [matrix.detach().cpu().clone() for matrix in self.merged]

    @override
    def on_train_epoch_end(self) -> None:
        self.trainer.should_stop = self.trainer.should_stop or bool(self._status[:, DONE].all())

    @override
    def on_fit_end(self) -> None:
        # A fit resumed with no epoch left to run has no end of training.
        if not self._ended:
            self.on_train_end()

    @override
    def on_train_end(self) -> None:
        self._ended = True
        clients = client_names([update.source for update in self.updates])
        layers, step = [layer.name for layer in self.layers], self.trainer.global_step
        log_merge(self.trainer.loggers, layers, clients, self.distances, self.influence, step)
        for complaint in (
            layer_status.unsolved(self.layers, self._status, self._method.converges),
            unusual(self.influence, clients, layers, self.max_influence),
        ):
            if complaint:
                rank_zero_warn(complaint)
        if self._keep_best and self._best is not None:
            self._set_merged(self._best[1])
        self.problems.forget()
        self._solvers.clear()
        self._progress.clear()
        if self._target:
            # What is missing are parameters that no client trained; they stay.
            self._target[0].load_state_dict(self.merged_state_dict(), strict=False)

    def _state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for layer, matrix in zip(self.layers, self.merged, strict=True):
            for name, tensor in layer.split(matrix.detach()).items():
                state[name] = tensor.to(self._dtypes[name])
        state |= {n: t.to(self.device) for n, t in self._merged_buffers.items()}
        shared = self.updates[0].header.aliases
        return state | {name: state[first] for name, first in shared.items()}

    @torch.no_grad()
    def _advance(self, index: int) -> None:
        """Moves one layer's solver by a sweep's iterations, and lets go of it when it is done."""
        layer, none = self.layers[index], [0.0] * len(self.updates)
        if index in self._progress and self._progress[index][1][DONE]:
            return
        if self._status[index, DONE]:  # before the merge was interrupted
            self._progress[index] = self._merged(index), self._status[index].tolist()
            return
        if index not in self._solvers:
            if not self._may_begin(index):
                self._progress[index] = self._merged(index), [0.0, 0.0, 1.0, *none, 0.0]
                return
            problem = self.problems.read(index, self.device, list(self.merged))
            self._solvers[index] = self._method.solver(problem)
        solver = self._solvers[index]
        solver.advance(min(self._method.sweep, self._max_iterations - solver.iterations))
        if not torch.isfinite(solver.weights).all():
            raise ValueError(
                f"the merge of layer {layer.name} left the finite numbers within "
                f"{solver.iterations} iterations: some client's curvature is too large, or none"
            )
        done = 0.0
        if solver.finished or solver.iterations >= self._max_iterations:
            done = layer_status.CONVERGED if solver.converged else layer_status.ENDED
        distances = solver.problem.distances(solver.weights) if done else none
        status = [float(solver.iterations), *solver.look(), *distances, done]
        self._progress[index] = solver.weights.to(self.merged[index].dtype), status
        if done:
            del self._solvers[index]

    def _may_begin(self, index: int) -> bool:
        before = self.problems.waits_for(index)
        if before is not None and not self._status[before, DONE]:
            return False
        # A method that looks for its best iterate moves all layers at once.
        looks = self._keep_best and self.trainer.enable_validation
        return looks or self.problems.fits(index, self._solvers)

    @torch.no_grad()
    def _gather(self) -> None:
        """Puts the global model together: each layer from the rank that owns it."""
        status = torch.zeros_like(self._status)
        for index, (_, numbers) in self._progress.items():
            status[index] = torch.tensor(numbers, dtype=torch.float64)
        matrices = []
        for index, matrix in enumerate(self.merged):
            own = self._progress[index][0] if index in self._progress else None
            # A sum of one term and zeros is exact.
            matrices.append(self._total(torch.zeros_like(matrix) if own is None else own.clone()))
        self._set_merged(matrices)
        self._status = self._total(status.to(self.device)).cpu()
        weighed = self._total(self.problems.weighed.to(self.device, copy=True)).cpu()
        # Layers that were solved before an interruption are not read again.
        self.influence = torch.where(weighed.any(dim=2, keepdim=True), weighed, self.influence)
        self.history.append(layer_status.summary(self._status))
        log = partial(self.log_dict, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        log(self.history[-1], prog_bar=True)
        if self.loggers:  # the price of each of many names is that of a small layer
            log(layer_status.by_layer(self.layers, self._status))

    def _merged(self, index: int) -> Tensor:
        matrix: Tensor = self.merged[index]
        return matrix.detach().clone()

    def _total(self, tensor: Tensor) -> Tensor:
        total = self.trainer.strategy.reduce(tensor, reduce_op="sum")
        assert isinstance(total, Tensor)
        return total

    def _set_merged(self, matrices: Sequence[Tensor]) -> None:
        for matrix, value in zip(self.merged, matrices, strict=True):
            matrix.data.copy_(value)
