"""FisherMergeModule: the server. Batches are layers, epochs are sweeps of the solvers.

The merge is a separate problem for each layer, so a Lightning `Trainer` runs it with the parts it
has: the train loader yields this rank's layers, a training step advances one layer's solver, and at
the end of each sweep the ranks put the global model together. Nothing is exchanged in between.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.data import DistributedSampler
from torchmetrics import MeanMetric
from typing_extensions import override

from lightning_fedfisher.admission import UpdateSource, check_fit, open_updates
from lightning_fedfisher.layers import Layer
from lightning_fedfisher.methods import METHODS, MethodName
from lightning_fedfisher.quadratic import Quadratic, Solver, average
from lightning_fedfisher.strategies import require_whole_model
from lightning_fedfisher.update import ClientUpdate

_IDLE = -1  # in place of a layer's index; Lightning would pass over a batch that is None
_LARGE_RESIDUAL = 1e-3


class FisherMergeModule(LightningModule):
    """Merges client updates into one model on a Lightning `Trainer`.

    Example::

        merge = FisherMergeModule(["client-0.safetensors", "client-1.safetensors"])
        Trainer(max_epochs=-1).fit(merge)
        torch.save(merge.merged_state_dict(), "merged.pt")

    It stops the trainer by itself once every layer is solved, so ``max_epochs=-1`` is right. Under
    ``strategy="ddp"`` ranks own whole layers, dealt by cost, and the result does not depend on
    their number. A merge resumed from a checkpoint starts over, to the same result.

    With a validation loader of ``(x, y)`` batches and a `model`, accuracy and negative
    log-likelihood of the global model are logged after every sweep.

    Attributes:
        updates: the opened updates, in the order given.
        history: one dictionary a sweep: ``iterations``, ``objective``, ``residual`` and, with a
            validation loader, ``val_accuracy`` (percent) and ``val_nll``.
    """

    def __init__(
        self,
        updates: Sequence[UpdateSource],
        *,
        model: nn.Module | None = None,
        method: MethodName = "fedfisher",
        keep_best: bool | None = None,
        max_iterations: int | None = None,
    ) -> None:
        """Opens and checks all updates.

        Args:
            updates: update files or `ClientUpdate` objects, one for each client.
            model: loaded with the result when the fit ends, and used for validation; optional.
            method: name of the merge method, a key of `METHODS`.
            keep_best: return the iterate best on the validation loader rather than the last one.
                As the method has it if None: the published methods do, ours does not.
            max_iterations: solver steps a layer at most; the method's own if None.

        Raises:
            MergeError: naming every update that is missing, corrupt, of another architecture, or
                without the curvature the method needs.
            ValueError: if the method is unknown or the model does not fit the updates.
        """
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
        self.automatic_optimization = False
        self.method = method
        self._method = METHODS[method]
        self._keep_best = self._method.keeps_best if keep_best is None else keep_best
        if max_iterations is not None and max_iterations < 1:
            raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
        self._max_iterations = max_iterations or self._method.iterations
        self.updates = open_updates(updates, method)
        self.layers = self.updates[0].layers
        self._shares = [update.num_samples for update in self.updates]
        # Parameters, so that checkpoints hold them and DDP takes the module. Buffers or submodules
        # would be overwritten by rank 0's, so the model stays outside the module tree.
        self.merged = nn.ParameterList(
            nn.Parameter(average(self._shares, self._weights(layer))) for layer in self.layers
        )
        self._merged_buffers = _merge_buffers(self.updates)
        self._dtypes = {n: t.dtype for n, t in self.updates[0].parameters.items()}
        self._target: list[nn.Module] = [] if model is None else [model]
        if model is not None:
            check_fit(model, self.merged_state_dict(), self.updates[0].header.frozen)
        self._replica: list[nn.Module] = []
        self._accuracy, self._nll = MeanMetric(), MeanMetric()
        self._validation_samples = 0
        self._turns = 0
        self._solvers: dict[int, Solver] = {}
        self._progress: dict[int, tuple[Tensor, list[float]]] = {}
        self._finished = False
        self._best: tuple[float, list[Tensor]] | None = None
        self.history: list[dict[str, float]] = []

    def merged_state_dict(self) -> dict[str, Tensor]:
        """The merged model: parameters and buffers by name, as the clients named them.

        Returns:
            Tensors on the CPU, in the clients' own dtypes. Before the fit, the average. Parameters
            that the clients had frozen are not among them: the model brings its own.
        """
        return {name: tensor.cpu() for name, tensor in self._state().items()}

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

    @override
    def configure_optimizers(self) -> Optimizer:
        return _SweepCounter(self.merged)

    @override
    def train_dataloader(self) -> _Sweep:
        hands = _deal([layer.shape for layer in self.layers], self.trainer.world_size)
        self._turns = max(map(len, hands))
        return _Sweep(hands[self.trainer.global_rank], self._turns)

    @override
    def on_fit_start(self) -> None:
        self._solvers, self._progress, self._best = {}, {}, None
        self._finished, self.history = False, []

    @override
    def on_train_start(self) -> None:
        if self.trainer.num_training_batches < self._turns:
            raise ValueError(
                "a sweep takes every layer, and limit_train_batches or fast_dev_run cuts it short: "
                "leave them out"
            )

    @override
    def on_validation_start(self) -> None:
        if not self._target:
            raise ValueError("a validation loader needs a model to run: pass model=...")
        loaders = self.trainer.val_dataloaders
        for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
            if isinstance(getattr(loader, "sampler", None), DistributedSampler):
                raise ValueError(
                    "every process needs all validation samples, each once: use "
                    "Trainer(use_distributed_sampler=False)"
                )
        # New ones each time: a state reset in inference mode could not be updated outside it.
        self._accuracy = MeanMetric().to(self.device)
        self._nll = MeanMetric().to(self.device)
        if not self._replica:
            self._replica = [copy.deepcopy(self._target[0]).to(self.device).eval()]

    @override
    def training_step(self, batch: int, batch_idx: int) -> None:
        if batch != _IDLE:
            self._advance(batch)
        if batch_idx + 1 == self._turns:
            optimizer = self.optimizers()
            assert not isinstance(optimizer, list)
            optimizer.step(self._gather)

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = functional_call(self._replica[0], self._state(), (x,))
        self._accuracy.update((logits.argmax(1) == y).float() * 100)
        self._nll.update(functional.cross_entropy(logits, y, reduction="none"))

    @override
    def on_validation_epoch_end(self) -> None:
        samples = int(self._nll.weight)
        accuracy, nll = float(self._accuracy.compute()), float(self._nll.compute())
        if self.trainer.sanity_checking:
            return
        scores = {"val_accuracy": accuracy, "val_nll": nll}
        self.log_dict(scores, prog_bar=True, batch_size=1, sync_dist=True)
        if not self.history or self.trainer.state.fn != TrainerFn.FITTING:
            return  # no sweep is complete, or this is no fit
        self._validation_samples = samples
        self.history[-1] |= scores
        if self._best is None or accuracy > self._best[0]:
            self._best = accuracy, [matrix.detach().clone() for matrix in self.merged]

    @override
    def on_train_epoch_end(self) -> None:
        self.trainer.should_stop = self.trainer.should_stop or self._finished

    @override
    def on_train_end(self) -> None:
        reached = self.history[-1] if self.history else {"iterations": 0.0, "residual": 1.0}
        short = self._method.converges and reached["residual"] > _LARGE_RESIDUAL
        if not self._finished or short:
            rank_zero_warn(
                f"the merge was stopped after {reached['iterations']:.0f} iterations, at a "
                f"relative residual of {reached['residual']:.1e}: it has not converged. Use "
                "Trainer(max_epochs=-1), and a larger max_iterations if that is not enough"
            )
        if self._keep_best and self._best is not None:
            self._set_merged(self._best[1])
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

    def _weights(self, layer: Layer) -> list[Tensor]:
        """Reads one layer's matrix from every update, in at least float32."""
        weights = [update.weights(layer) for update in self.updates]
        dtype = torch.promote_types(weights[0].dtype, torch.float32)
        return [matrix.to(self.device, dtype) for matrix in weights]

    def _problem(self, layer: Layer) -> Quadratic:
        """Reads one layer's quadratic from every update."""
        weights = self._weights(layer)
        blocks = [update.block(layer).to(self.device, weights[0].dtype) for update in self.updates]
        return Quadratic(self._shares, weights, [self._method.transform(b) for b in blocks])

    @torch.no_grad()
    def _advance(self, index: int) -> None:
        """Moves one layer's solver by a sweep's iterations, and lets go of it when it is done."""
        if index in self._progress and index not in self._solvers:
            return
        layer = self.layers[index]
        if index not in self._solvers:
            self._solvers[index] = self._method.solver(self._problem(layer))
        solver = self._solvers[index]
        solver.advance(min(self._method.sweep, self._max_iterations - solver.iterations))
        if not torch.isfinite(solver.weights).all():
            raise ValueError(
                f"the merge of layer {layer.name} left the finite numbers within "
                f"{solver.iterations} iterations: some client's curvature is too large, or none"
            )
        done = solver.finished or solver.iterations >= self._max_iterations
        objective = solver.problem.objective(solver.weights)
        status = [float(solver.iterations), objective, solver.residual, float(done)]
        self._progress[index] = solver.weights, status
        if done:
            del self._solvers[index]

    @torch.no_grad()
    def _gather(self) -> None:
        """Puts the global model together: each layer from the rank that owns it."""
        status = torch.zeros(len(self.layers), 4, dtype=torch.float64)
        for index, (_, numbers) in self._progress.items():
            status[index] = torch.tensor(numbers, dtype=torch.float64)
        matrices = []
        for index, matrix in enumerate(self.merged):
            own = self._progress[index][0] if index in self._progress else None
            # A sum of one term and zeros is exact.
            matrices.append(self._total(torch.zeros_like(matrix) if own is None else own.clone()))
        self._set_merged(matrices)
        iterations, objectives, residuals, done = self._total(status.to(self.device)).cpu().T
        entry = {
            "iterations": float(iterations.max()),
            "objective": float(objectives.sum()),
            "residual": float(residuals.max()),
        }
        self._finished = bool(done.all())
        self.history.append(entry)
        self.log_dict(
            entry, on_step=False, on_epoch=True, prog_bar=True, batch_size=1, sync_dist=True
        )

    def _total(self, tensor: Tensor) -> Tensor:
        total = self.trainer.strategy.reduce(tensor, reduce_op="sum")
        assert isinstance(total, Tensor)
        return total

    def _set_merged(self, matrices: Sequence[Tensor]) -> None:
        for matrix, value in zip(self.merged, matrices, strict=True):
            matrix.data.copy_(value)


class _SweepCounter(Optimizer):
    """Runs the closure it is given: an optimizer, so that Lightning counts sweeps as steps.

    Checkpoints, loggers and progress bars go by that count, and it must be the same on every rank.
    """

    def __init__(self, parameters: nn.ParameterList) -> None:
        super().__init__(list(parameters), {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return None if closure is None else closure()


class _Sweep:
    """The layers of one rank. No `DataLoader`: it must neither be sampled nor filled with copies.

    Lightning exchanges a signal at every batch, so all ranks take the same number; a rank with
    fewer layers has idle turns. They come first, then the cheaper layers, because the other
    ranks wait for rank 0's signal at the start of a turn.
    """

    def __init__(self, owned: Sequence[int], turns: int) -> None:
        self._turns = [_IDLE] * (turns - len(owned)) + list(owned)

    def __iter__(self) -> Iterator[int]:
        return iter(self._turns)

    def __len__(self) -> int:
        return len(self._turns)


def _deal(shapes: Sequence[tuple[int, int]], ranks: int) -> list[list[int]]:
    """Deals layers to ranks by the cost of a step: the costliest first, each to the least busy.

    Returns:
        The layers of each rank, the cheapest first.
    """
    costs = [rows * columns * (rows + columns) for rows, columns in shapes]
    hands: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = loads.index(min(loads))
        hands[rank].append(index)
        loads[rank] += costs[index]
    return [hand[::-1] for hand in hands]


def _merge_buffers(updates: Sequence[ClientUpdate]) -> dict[str, Tensor]:
    """Counters by maximum, running variances by the law of total variance, the rest by average."""
    shares = [update.num_samples for update in updates]
    clients = [update.buffers for update in updates]
    merged: dict[str, Tensor] = {}
    for name, first in clients[0].items():
        values = [buffers[name] for buffers in clients]
        location = name.removesuffix("running_var") + "running_mean"
        if not first.is_floating_point():
            merged[name] = torch.stack(values).amax(0)
        elif name.endswith("running_var") and location in clients[0]:
            means = [buffers[location] for buffers in clients]
            pooled = average(shares, means)
            spread = average(shares, [(mean - pooled).square() for mean in means])
            merged[name] = average(shares, values) + spread
        else:
            merged[name] = average(shares, values)
    return merged
