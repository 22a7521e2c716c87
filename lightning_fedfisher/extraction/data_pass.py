"""One pass over a client's samples: which directions are back-propagated, on which copy of a model.

The backends and accumulators only add up; this file decides what they are given. The user's module
is never touched: everything runs on one deep copy in eval mode, in float32 or better.

The exact Fisher takes up to one backward pass for each sample and class. On a trained model most of
them carry next to nothing. So the logits of a batch tell first how many directions each of its
samples needs, and samples that need about as many are then run together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError
from tqdm import tqdm

from lightning_fedfisher.batch_norms import RunningStatistics
from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.curvature.registry import CurvatureType
from lightning_fedfisher.distributed.processes import Shard, warn_on_rank_zero
from lightning_fedfisher.errors import FedFisherError, UnsupportedModelError
from lightning_fedfisher.extraction.accumulators.model_sums import ModelAccumulator
from lightning_fedfisher.extraction.backends.backpack import (
    BackpackDiagonal,
    BackpackError,
    why_unsupported,
)
from lightning_fedfisher.extraction.backends.output_gradients import DifferentCallsError
from lightning_fedfisher.extraction.batches import (
    MixedSamplesError,
    is_out_of_memory,
    map_samples,
    require_same_logits,
)
from lightning_fedfisher.extraction.fisher_types import Directions, residual_directions
from lightning_fedfisher.extraction.held_losses import require_no_probabilities
from lightning_fedfisher.extraction.layer_report import LayerReport
from lightning_fedfisher.extraction.model_copy import copy_model, first_buffers
from lightning_fedfisher.extraction.options import ExtractionOptions
from lightning_fedfisher.extraction.preview import trace_model
from lightning_fedfisher.extraction.running_statistics import (
    measure_statistics,
    trained_norms,
)
from lightning_fedfisher.extraction.sampling import SamplePartition
from lightning_fedfisher.extraction.tracing.model_trace import ModelTrace
from lightning_fedfisher.layers import Layer
from lightning_fedfisher.likelihoods.registry import LIKELIHOODS

Found = dict[CurvatureType, tuple[dict[str, Curvature], tuple[LayerReport, ...]]]
"""Blocks by layer name and the layers' reports, by kind of curvature."""

# Samples run together, with all their directions, may hold three quarters of what a batch with one
# direction a sample holds, its inputs and one gradient each: the batch itself is held beside them.
_HELD_SHARE = 3 / 4
_HELD_BY_ONE_DIRECTION = 2
# Tells the random numbers that choose positions from those that draw directions.
_POSITIONS = 1


class DataPass:
    """Runs a copy of the model over samples and adds up second moments of gradients.

    Attributes:
        count: Number of samples that were run; after `finish`, over all processes.
        trace: Sum of the squared lengths of all directions; after `finish`, over all processes.
        discarded: Part of `trace` that belongs to directions left out.
        model_trace: What a forward pass of a few samples told about the model, once `run`.
        statistics: The running statistics that were measured, once `run`; None for none.
    """

    model_trace: ModelTrace

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        curvatures: Sequence[CurvatureType],
        options: ExtractionOptions,
        *,
        shard: Shard,
        trace: ModelTrace | None,
        prepare: Callable[[Any], Any] | None,
        bar: tqdm[Any],
        on_progress: Callable[[int, int | None], None] | None,
    ) -> None:
        """Keeps the arguments; runs nothing.

        Args:
            model: The user's model, of which a copy is run.
            layers: Layers of the model.
            curvatures: Kinds of curvature wanted, none of them the identity.
            options: Options of the extraction, except for its kind of curvature.
            shard: The place of this process among several.
            trace: The trace of an earlier extraction from the same model, or None.
            prepare: Function applied to each batch first, or None.
            bar: Progress bar, shown or not.
            on_progress: Function that is told after each batch how many samples of this process
                are done, and of how many, or None.
        """
        self._model, self._layers, self._curvatures = model, layers, tuple(curvatures)
        self._options, self._shard, self._known_trace = options, shard, trace
        self._runner = options.runner(prepare)
        self._bar, self._on_progress = bar, on_progress
        self._buffers = first_buffers(model, shard)
        self.count, self.trace, self.discarded = 0, 0.0, 0.0
        self.statistics: RunningStatistics | None = None
        self._copy: nn.Module | None = None
        self._sums: ModelAccumulator | BackpackDiagonal | None = None
        # Why BackPACK does not collect a diagonal; empty as long as it may.
        self._backpack_problem = ""
        self._varying: frozenset[str] = frozenset()  # layers that only some batches use

    def run(self, samples: SamplePartition) -> None:
        """Runs all samples from the start, in smaller batches if memory does not suffice.

        Args:
            samples: The samples of this process.
        """
        self._samples = _halve_until_it_fits(samples, self._run_once)

    def _run_once(self, samples: SamplePartition) -> SamplePartition:
        """Runs all samples, anew where something was found out, and gives them as they were run."""
        while True:
            try:
                self._start(samples)
                self._pass(samples)
                return samples
            except BackpackError as error:
                # BackPACK cannot be taken off the copy again: a new copy goes on without it.
                self._backpack_problem = str(error)
            except DifferentCallsError as error:
                if self._known_trace is not None:
                    self._known_trace = None  # the model may have changed since
                elif error.layers <= self._varying:
                    raise
                else:
                    self._varying |= error.layers
            except MixedSamplesError as error:
                samples = self._one_by_one(samples, error)

    def _one_by_one(self, samples: SamplePartition, error: MixedSamplesError) -> SamplePartition:
        """Gives the samples in batches of one, if all that failed was to cut their batches."""
        if samples.rebatch is None or samples.alone is None or samples.batch_size == 1:
            raise error
        copied = copy_model(self._model, self._buffers)
        with torch.no_grad():
            few, one = (
                self._runner.logits(copied, self._runner.prepare(copied, batch))
                for batch in (samples.preview(), samples.alone())
            )
        if len(one) != 1:
            raise error
        require_same_logits(one, few, slice(0, 1))
        warn_on_rank_zero(
            "samples cannot be cut out of their batches (lists, offsets, graphs, time first?): the "
            "curvature is extracted in batches of one sample"
        )
        return samples.rebatch(1)

    def finish(self) -> Found:
        """Adds up over processes and divides, with a second pass first if one is needed.

        Returns:
            Blocks by layer name and the layers' reports, by kind of curvature.

        Raises:
            ValueError: If there were no samples.
        """
        sums, shard = self._sums, self._shard
        assert sums is not None
        assert self._copy is not None
        device = next(self._copy.parameters()).device
        numbers = torch.tensor([self.count, self.trace, self.discarded], dtype=torch.float64)
        if device.type == "mps":  # which has no float64
            numbers = numbers.float()
        totals = shard.total(numbers.to(device)).tolist()
        count = int(totals[0])
        if count == 0:
            raise ValueError("the client holds no samples: there is no curvature to extract")
        if isinstance(sums, ModelAccumulator) and "ekfac" in self._curvatures:
            self._correct(sums, count)
        self._copy = None  # whose memory is free for the factors
        found = {
            kind: (sums.finish(kind, shard.total, count), self._layer_reports(kind))
            for kind in self._curvatures
        }
        self.count, (self.trace, self.discarded) = count, totals[1:]
        if isinstance(sums, ModelAccumulator):
            sums.release()
        self._sums = None
        return found

    def _layer_reports(self, kind: CurvatureType) -> tuple[LayerReport, ...]:
        """How each layer's curvature came about, and why BackPACK did not collect it if asked."""
        assert self._sums is not None
        reports = self._sums.layer_reports(kind)
        if not self._backpack_problem:
            return reports
        because = f"not by BackPACK, as {self._backpack_problem}"
        return tuple(replace(report, reason=report.reason or because) for report in reports)

    def _correct(self, sums: ModelAccumulator, count: int) -> None:
        """Finds the eigenbases of the factors and their spectra, in a second pass if need be."""
        sums.find_eigenbases(self._shard.total, self._shard.first, count)
        if not sums.needs_second_pass:
            sums.add_kept()
            return
        if not self._samples.again:
            raise ValueError(
                "ekfac of so many samples takes two passes over them, and an iterator has one: "
                'pass a DataLoader or a list of batches, or curvature="kfac"'
            )

        def attempt(samples: SamplePartition) -> SamplePartition:
            sums.begin_second_pass()
            self._pass(samples)
            return samples

        _halve_until_it_fits(self._samples, attempt)

    def _start(self, samples: SamplePartition) -> None:
        """Copies the model, traces it, and chooses what adds up."""
        self._sums = self._copy = None  # whose memory is free for the next ones
        copied = self._copy = copy_model(self._model, self._buffers)
        self._measure_statistics(copied, samples)
        traced = self._known_trace
        if traced is None:
            traced = trace_model(copied, self._layers, self._runner, samples)
            traced = traced.with_varying(self._varying)
        require_no_probabilities(traced.last_operation, traced.sums_to_one, self._options)
        self.model_trace = traced
        if self._curvatures == ("diagonal",) and not self._backpack_problem:
            self._backpack_problem = why_unsupported(copied, self._layers, traced)
            if not self._backpack_problem:
                self._sums = BackpackDiagonal(copied, self._layers)
                return
        self._sums = ModelAccumulator(
            copied,
            self._layers,
            traced,
            self._curvatures,
            self._runner.logits,
            self._options.positions,
        )

    def _measure_statistics(self, copied: nn.Module, samples: SamplePartition) -> None:
        """Gives a copy the running statistics that its weights have, if that is asked for."""
        norms = trained_norms(self._model) if self._options.estimate_statistics else ()
        if norms and samples.mixed is None:
            warn_on_rank_zero(
                "running statistics are sent as training left them: they take a pass of their own "
                "over the samples, and a stream may have one alone (pass a DataLoader over a "
                "map-style data set, or a list of batches)"
            )
        elif norms and self.statistics is None:
            self.statistics = measure_statistics(
                *(copied, self._layers, norms, self._runner, samples, self._shard),
                most=self._options.max_samples,
                bar=self._bar,
            )
            if not self.statistics.buffers:
                warn_on_rank_zero(
                    "running statistics are sent as training left them: no batch has the two "
                    "samples that a variance takes (batch_size=)"
                )
        if self.statistics is not None:
            for name, tensor in self.statistics.buffers.items():
                copied.get_buffer(name).copy_(tensor)

    def _pass(self, samples: SamplePartition) -> None:
        """Runs every batch once, and adds up from zero."""
        copied, options = self._copy, self._options
        assert copied is not None
        draw = samples.uniforms(options.seed)
        choose = samples.uniforms(options.seed, _POSITIONS)
        self.trace, self.discarded = 0.0, 0.0

        def add(batch: Any) -> int:
            return self._batch(self._runner.prepare(copied, batch), draw, choose)

        self.count = samples.run(add, options.max_samples, self._bar, self._on_progress)

    def _batch(
        self,
        batch: Any,
        draw: Callable[[int, int], Tensor],
        choose: Callable[[int, int], Tensor],
    ) -> int:
        """Runs one batch with all its directions, and returns its number of samples."""
        options = self._options
        if self._curvatures == ("input_gram",):
            return self._batch_of_inputs(batch, choose)
        # Where the number of directions depends on the logits, these are computed beforehand.
        beforehand = options.fisher == "exact" or options.draws > 1
        with torch.no_grad() if beforehand else nullcontext():
            logits, labels = self._forward(batch)
        samples = len(logits)
        directions = residual_directions(
            logits,
            labels,
            options.fisher,
            options.likelihood,
            draw=lambda n: draw(samples, n),
            draws=options.draws,
            tolerance=options.tolerance,
        )
        self.trace += directions.trace
        self.discarded += directions.discarded
        uniforms = choose(samples, 1).squeeze(1)  # which choose positions
        if beforehand:
            for rows in _similar_samples(directions):
                self._some(batch, logits, directions, rows, uniforms)
        else:
            self._backward(batch, logits, [directions.first], uniforms)
        return samples

    def _batch_of_inputs(self, batch: Any, choose: Callable[[int, int], Tensor]) -> int:
        """Runs one batch forward alone: its labels do not matter, and nothing is drawn."""
        assert isinstance(self._sums, ModelAccumulator)
        logits, _ = self._forward(batch)
        LIKELIHOODS[self._options.likelihood].check_logits(logits)
        return self._sums.add_inputs(logits, choose(len(logits), 1).squeeze(1))

    def _some(
        self, batch: Any, logits: Tensor, directions: Directions, rows: Tensor, uniforms: Tensor
    ) -> None:
        """Runs some samples of a batch with all their directions."""
        some = map_samples(batch, len(logits), lambda tensor: tensor[rows])
        try:
            again, _ = self._forward(some)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            if isinstance(error, FedFisherError | DifferentCallsError | BackpackError):
                raise
            raise MixedSamplesError(error) from error  # as where a batch is cut that cannot be
        require_same_logits(again, logits, rows)
        self._backward(some, again, directions.of(rows), uniforms[rows.to(uniforms.device)])

    def _backward(
        self, batch: Any, logits: Tensor, directions: Sequence[Tensor], uniforms: Tensor
    ) -> None:
        assert self._sums is not None
        try:
            self._sums.backward(batch, logits, directions, uniforms)
        except CheckpointError as error:
            raise UnsupportedModelError(
                [
                    "the model runs parts of itself again in the backward pass: switch gradient "
                    "checkpointing off in eval mode"
                ]
            ) from error

    def _forward(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        assert self._copy is not None
        assert self._sums is not None
        with self._sums.watch():
            return self._runner(self._copy, batch)


def _similar_samples(directions: Directions) -> Iterator[Tensor]:
    """Samples with about as many directions, few enough for all their gradients to be held."""
    counts = directions.counts
    budget = _HELD_SHARE * _HELD_BY_ONE_DIRECTION * len(counts)
    levels = counts.float().log2().ceil().int()
    for level in range(int(levels.max()) + 1):
        indices = (levels == level).nonzero().squeeze(1)
        if len(indices) == 0:
            continue
        held = 1 + int(counts[indices].max())  # of each sample, its inputs and all its gradients
        yield from torch.split(indices, max(1, int(budget // held)))


def _halve_until_it_fits(
    samples: SamplePartition, attempt: Callable[[SamplePartition], SamplePartition]
) -> SamplePartition:
    """Tries with ever smaller batches for as long as memory does not suffice."""
    while True:
        try:
            return attempt(samples)
        except RuntimeError as error:
            size, rebatch = samples.batch_size, samples.rebatch
            if not is_out_of_memory(error) or rebatch is None or size is None or size == 1:
                raise
        # Outside the handler, which holds on to everything the attempt had.
        warn_on_rank_zero(
            f"memory did not suffice for batches of {size} samples: the curvature is extracted "
            f"anew in batches of {size // 2}"
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        samples = rebatch(size // 2)
