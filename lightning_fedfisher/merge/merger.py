"""A merge in work: each layer's solver, and the model that they make together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_fedfisher._utils.text import client_names, terminal_lines, terminal_text
from lightning_fedfisher.batch_norms import buffer_names
from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.errors import MergeError, UpdateError
from lightning_fedfisher.likelihoods.base import Likelihood
from lightning_fedfisher.likelihoods.registry import LIKELIHOODS
from lightning_fedfisher.merge.agreement import describe_disagreement
from lightning_fedfisher.merge.buffers import describe_mixed_statistics, merge_buffers
from lightning_fedfisher.merge.carried_statistics import (
    ALIKE,
    carried_buffers,
    common_norms,
    describe_unlike,
    similarity,
)
from lightning_fedfisher.merge.compatibility import UpdateSource, open_updates, require_fit
from lightning_fedfisher.merge.duplicates import without_duplicates
from lightning_fedfisher.merge.influence_cap import MEASURES
from lightning_fedfisher.merge.layer_loader import LayerLoader
from lightning_fedfisher.merge.layer_state import (
    LayerState,
    describe_unsolved,
    summarize,
)
from lightning_fedfisher.merge.methods import MergeMethod
from lightning_fedfisher.merge.options import MergeOptions
from lightning_fedfisher.merge.outliers import describe_outliers
from lightning_fedfisher.merge.preparation import prepare_by_ranks
from lightning_fedfisher.merge.result import MergeResult, contributions, layer_results
from lightning_fedfisher.merge.running_statistics import Estimate, estimator
from lightning_fedfisher.merge.solvers import Solver
from lightning_fedfisher.merge.validation import goodness
from lightning_fedfisher.update.client_update import ClientUpdate


class Merger:
    """A merge in work: a solver for each layer, and what came of them so far.

    An epoch is `advance` for each layer, on the rank that owns it, and `finish_epoch` on all ranks.

    Attributes:
        updates: The updates of all clients.
        layers: Their layers.
        method: The merge method, with what the options change of it.
        loader: Reads each layer's problem.
        merged: The merged matrices, one for each layer; nothing of value in those of `unread`.
        unread: Layers whose merge has not begun and that nobody looked at (see `fill`).
        buffers: The merged buffers by name.
        states: How far each layer has come.
        influence: What each client weighs, of shape ``(layers, clients, 3)``.
        history: What is logged of each epoch.
        validation_samples: Labelled samples that the last validation saw.
        unlabelled_samples: Samples that running statistics were last estimated on.
        best: The best score on them, with the merged matrices there; None without validation.
        similarity: How much a merge of the clients would compute what they compute
            (`carried_statistics`); None if it is not known, or nothing depends on it.
        seconds: Wall-clock time of the merge; None before its end.

    Example:
        >>> def merge(updates, options):
        ...     merger = Merger.open(updates, options)
        ...     while not merger.done:
        ...         for index in range(len(merger.layers)):
        ...             merger.advance(index)
        ...         merger.finish_epoch()
        ...     return merger.result()
        >>> merge([], MergeOptions())
        Traceback (most recent call last):
        lightning_fedfisher.errors.MergeError: These updates cannot be merged:
          - there are none: pass the update files of at least one client
    """

    def __init__(
        self,
        updates: Sequence[ClientUpdate],
        method: MergeMethod,
        budget: int,
        estimate: Estimate | None = None,
    ) -> None:
        """Reads no layer yet; see `open`.

        Args:
            updates: The updates of all clients, found to belong together.
            method: The merge method.
            budget: Bytes of clients' weights and curvature to hold at a time.
            estimate: Finds the running statistics of a merged state; None merges the clients'.
        """
        self.updates, self.method, self.layers = updates, method, updates[0].layers
        self._norms = {} if estimate is not None else common_norms(updates)
        self.similarity: float | None = None
        if method.output_transform is not None and (self._norms or estimate is not None):
            with _refusing():
                self.similarity = similarity(updates)
        own_statistics = bool(self._norms) or estimate is not None
        # Samples alone were enough before updates told how alike they are.
        unknown = 1.0 if estimate is not None else 0.0
        alike = (unknown if self.similarity is None else self.similarity) >= ALIKE
        self.loader = LayerLoader(updates, method, budget, keeps_means=own_statistics and alike)
        self.merged: Sequence[Tensor] = [
            torch.zeros(layer.shape, dtype=self.loader.dtype(index))
            for index, layer in enumerate(self.layers)
        ]
        self.buffers = merge_buffers(updates, method.max_influence)
        self._estimate = estimate
        carried = [name for path in self._norms for name in buffer_names(path)]
        self._mixed = "" if estimate else describe_mixed_statistics(updates, carried)
        self._device = torch.device("cpu")
        self.restart()

    @classmethod
    def open(
        cls,
        sources: Sequence[UpdateSource],
        options: MergeOptions,
        model: nn.Module | None = None,
        statistics_loader: Iterable[Any] | None = None,
    ) -> Self:
        """Opens and checks all updates.

        Args:
            sources: Update files or `ClientUpdate` objects, one for each client.
            options: What is asked of the merge.
            model: A model that the updates must fit; None if there is none.
            statistics_loader: Batches of inputs to estimate running statistics on, or None.

        Raises:
            MergeError: If updates cannot be merged by the method; all are named.
            ValueError: If the model does not fit, or has no running statistics to estimate.
        """
        estimate = None
        if statistics_loader is not None:
            if options.row.takes_fits:
                raise ValueError(
                    f"{options.row.name} has a head for the clients' own statistics: leave the "
                    "statistics loader out"
                )
            estimate = estimator(model, statistics_loader)
        updates = open_updates(sources, options.row, options.skip_invalid)
        if not options.allow_duplicates:
            updates = without_duplicates(updates)
        if model is not None:
            require_fit(model, updates[0])
        return cls(updates, options.row, options.memory_budget, estimate)

    def restart(self) -> None:
        """Starts anew, with nothing solved."""
        clients, layers = len(self.updates), len(self.layers)
        self.release()
        self.states = [LayerState.waiting(clients)] * layers
        self.unread = set(range(layers))
        self.influence = torch.zeros(layers, clients, len(MEASURES), dtype=torch.float64)
        self.history: list[dict[str, float]] = []
        self.best: tuple[float, list[Tensor]] | None = None
        self.validation_samples = self.unlabelled_samples = 0
        self.seconds: float | None = None

    def release(self) -> None:
        """Lets go of solvers, and of what was held in memory or on disk for them."""
        self.solvers: dict[int, Solver] = {}
        self._pending: dict[int, tuple[Tensor, LayerState]] = {}
        self._measured: dict[int, Tensor] = {}
        self._prepared: dict[int, Iterable[Curvature]] = {}
        self.loader.forget()

    def move_to(self, device: torch.device) -> None:
        """Works on another device from now on.

        Args:
            device: Where the merged matrices are, or are to be.
        """
        self._device = device
        for matrix in self.merged:
            matrix.data = matrix.data.to(device)

    @property
    def done(self) -> bool:
        """Whether every layer's solver has ended."""
        return all(state.done for state in self.states)

    @property
    def likelihood(self) -> type[Likelihood]:
        """The likelihood of the clients' labels."""
        return LIKELIHOODS[self.updates[0].header.likelihood]

    def prepare(self, rank: int, ranks: int) -> None:
        """Prepares curvature that other ranks would have to wait for; each rank must call this.

        Args:
            rank: The rank of this process.
            ranks: Number of processes.
        """
        unsolved = [index for index, state in enumerate(self.states) if not state.done]
        self._prepared.update(prepare_by_ranks(self.loader, unsolved, rank, ranks, self._device))

    @torch.no_grad()
    def advance(self, index: int, at_once: bool = False) -> None:
        """Moves one layer's solver by an epoch's steps; `finish_epoch` shows what came of it.

        Args:
            index: Index of the layer.
            at_once: Whether to begin the layer even beyond the memory budget.

        Raises:
            MergeError: If weights or curvature cannot be decoded or overflow float32, naming the
                clients.
            ValueError: If the layer's iterates leave the finite numbers.
        """
        if index in self._pending and self._pending[index][1].done:
            return
        if self.states[index].done or not (index in self.solvers or self._begin(index, at_once)):
            self._keep(index)
            return
        solver, method = self.solvers[index], self.method
        solver.advance(min(method.steps_per_epoch, method.max_iterations - solver.iterations))
        if not torch.stack(solver.weights.aminmax()).isfinite().all():
            raise ValueError(
                f"the merge of layer {terminal_text(self.layers[index].name)} left the finite "
                f"numbers within {solver.iterations} iterations: some client's curvature is too "
                "large, or none"
            )
        state = LayerState.of(solver, method.max_iterations)
        self._pending[index] = solver.weights.to(self.merged[index].dtype), state
        if state.done:
            del self.solvers[index]

    def _keep(self, index: int) -> None:
        """Leaves a layer as it is for this epoch: it is done, or waits for its turn."""
        self._pending[index] = self.merged[index].detach(), self.states[index]

    def _begin(self, index: int, at_once: bool) -> bool:
        """Reads a layer's problem, if its turn has come."""
        before = self.loader.alignments.waits_for(index)
        if before is not None and not self.states[before].done:
            return False
        if not at_once and not self.loader.budget.fits(index, self.solvers):
            return False
        ready = self._prepared.pop(index, None)
        with _refusing():
            loaded = self.loader.read(index, self._device, self.merged, ready)
        self.loader.budget.sizes[index] = loaded.nbytes
        self._measured[index] = loaded.influence
        self.solvers[index] = self.method.solver(loaded.problem)
        return True

    @torch.no_grad()
    def finish_epoch(self, total: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """Puts the merged model together, each layer from the rank that owns it.

        Args:
            total: Adds a tensor up over all ranks.
        """
        clients = len(self.updates)
        rows = torch.zeros(len(self.layers), LayerState.width(clients), dtype=torch.float64)
        influence = torch.zeros_like(self.influence)
        for index, (_, state) in self._pending.items():
            rows[index] = state.to_row()
        for index, measured in self._measured.items():
            influence[index] = measured
        self.states = [LayerState.from_row(row) for row in total(rows.to(self._device)).cpu()]
        for index, (state, matrix) in enumerate(zip(self.states, self.merged, strict=True)):
            if state.waits:
                continue  # each rank has the average, or reads it when somebody looks
            self.unread.discard(index)
            own = self._pending[index][0] if index in self._pending else None
            # A sum of one term and zeros is exact.
            matrix.detach().copy_(total(torch.zeros_like(matrix) if own is None else own.clone()))
        influence = total(influence.to(self._device)).cpu()
        # Layers that were solved before an interruption are not read again.
        self.influence = influence.where(influence.any(dim=2, keepdim=True), self.influence)
        self.history.append(summarize(self.states))

    def judge(self, scores: Mapping[str, float], samples: int) -> None:
        """Takes note of how the merged model scores, and keeps the best one.

        Args:
            scores: What `validation.validate` returned.
            samples: Labelled samples that were seen.
        """
        self.validation_samples = samples
        self.history[-1] |= scores
        score = goodness(scores)
        if self.best is None or score > self.best[0]:
            self.best = score, [matrix.detach().cpu().clone() for matrix in self.merged]

    def take_best(self) -> None:
        """Goes back to the best iterate, if the method keeps it and there was a validation."""
        if self.method.keeps_best and self.best is not None:
            for matrix, value in zip(self.merged, self.best[1], strict=True):
                matrix.detach().copy_(value)

    @torch.inference_mode(False)  # or what is found would be of no use outside of it
    def refresh_statistics(self) -> None:
        """Finds the running statistics of the model as it is now.

        On the samples, if there are some; else each client's are carried over, where it sent what
        that takes.
        """
        if self._norms:
            self.fill()
            names = (layer.name for layer in self.layers)
            matrices = dict(zip(names, (m.detach() for m in self.merged), strict=True))
            with _refusing():
                moments = not self.method.ignores_curvature  # or nobody has checked it
                carried = carried_buffers(self.updates, matrices, moments)
            self.buffers = merge_buffers(self.updates, self.method.max_influence, carried)
        if self._estimate is None:
            return
        found, self.unlabelled_samples = self._estimate(self.state_dict(), self._device)
        shared = self.updates[0].header.aliases
        for name, tensor in found.items():
            first = shared.get(name, name)
            self.buffers[first] = tensor.to(self.buffers[first])

    def fill(self) -> None:
        """Reads the average where no solver has begun, for whoever looks at the whole model."""
        for index in sorted(self.unread):
            self.merged[index].detach().copy_(self.loader.average(index))
        self.unread.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """The merged parameters and buffers by name, on the device, in the clients' own dtypes."""
        self.fill()
        specs, state = self.updates[0].specs, dict[str, Tensor]()
        for layer, matrix in zip(self.layers, self.merged, strict=True):
            for name, tensor in layer.split(matrix.detach()).items():
                state[name] = tensor.to(specs[name][1])
        state |= {name: buffer.to(self._device) for name, buffer in self.buffers.items()}
        shared = self.updates[0].header.aliases
        return state | {name: state[first] for name, first in shared.items()}

    @property
    def distances(self) -> Tensor:
        """How far each layer was moved from each client, of shape ``(layers, clients)``."""
        return torch.tensor([state.distances for state in self.states], dtype=torch.float64)

    @property
    def server_labels(self) -> int:
        """Number of labelled samples that decided which iterate is returned."""
        return self.validation_samples if self.method.keeps_best else 0

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should look at, in a sentence each."""
        clients = client_names([update.source for update in self.updates])
        names = [terminal_text(layer.name) for layer in self.layers]
        most = self.method.max_influence
        unsolved = describe_unsolved(names, self.states, self.method.converges)
        outliers = describe_outliers(self.influence, clients, names, most)
        unlike = describe_unlike(self.similarity) if self._norms else ""
        apart = describe_disagreement(self.method, self.updates[0].header, self.states)
        every = (unsolved, outliers, self._mixed, unlike, apart)
        return tuple(terminal_lines(text) for text in every if text)

    def result(self) -> MergeResult:
        """What came of the merge so far."""
        header = self.updates[0].header
        promised = self.method.converges, header.fit is not None
        return MergeResult(
            state_dict={name: tensor.cpu() for name, tensor in self.state_dict().items()},
            method=self.method.name,
            max_influence=self.method.max_influence,
            layers=layer_results(self.layers, self.states, *promised),
            clients=contributions(self.updates, self.loader.client_weights),
            distances=self.distances,
            influence=self.influence.clone(),
            history=tuple(dict(entry) for entry in self.history),
            warnings=self.warnings,
            server_labels=self.server_labels,
            unlabelled_samples=self.unlabelled_samples,
            similarity=self.similarity,
            curvature=header.curvature,
            fisher=header.fisher,
            likelihood=header.likelihood,
            model_fingerprint=self.updates[0].model_fingerprint,
            fedavg_bytes=self.updates[0].fedavg_bytes,
            seconds=self.seconds,
        )


@contextmanager
def _refusing() -> Iterator[None]:
    """Refuses the merge where something was packed so that it cannot be unpacked."""
    try:
        yield
    except UpdateError as error:
        raise MergeError([str(error)]) from error
