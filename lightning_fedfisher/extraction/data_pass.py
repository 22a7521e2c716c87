"""One sweep over a client's samples: what is back-propagated, on what copy of the model.

`second_moments` and `diagonal` only add up; this file decides what. The user's module is never
touched: everything runs on a deep copy in eval mode, in float32 or better.

The exact Fisher takes up to one backward pass for each sample and class. On a trained model most of
them carry next to nothing. So a batch's logits tell first how many directions each of its samples
needs, and samples that need about as many are then run together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError
from tqdm import tqdm

from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.curvature.diagonal import Diagonal
from lightning_fedfisher.errors import UnsupportedModelError
from lightning_fedfisher.extraction.accumulators.model_sums import ModelAccumulator
from lightning_fedfisher.extraction.backends.backpack import (
    BackpackDiagonal,
    BackpackError,
    why_not,
)
from lightning_fedfisher.extraction.batches import (
    Runner,
    map_samples,
    replicate,
    require_same_logits,
)
from lightning_fedfisher.extraction.fisher_types import (
    Directions,
    FisherType,
    residual_directions,
)
from lightning_fedfisher.extraction.layer_report import CurvatureType, LayerReport
from lightning_fedfisher.extraction.sampling import PREVIEW, SamplePartition, Shard
from lightning_fedfisher.extraction.tracing.model_trace import ModelTrace, ModelTracer
from lightning_fedfisher.layers import Layer

Found = dict[CurvatureType, tuple[dict[str, Curvature], tuple[LayerReport, ...]]]
"""Blocks by layer name and treatments, by kind."""


@dataclass(frozen=True)
class FisherOptions:
    """The likelihood and the Fisher type of an extraction.

    Attributes:
        name: of the likelihood.
        fisher: Fisher type.
        draws: directions a sample, for the types that draw.
        tolerance: share of each batch's trace that the exact type may leave out.
    """

    name: str
    fisher: FisherType
    draws: int
    tolerance: float


class DataPass:
    """Runs a copy of the model over samples and adds up second moments.

    Attributes:
        count: samples that were run.
        trace: sum of the squared lengths of all directions.
        discarded: part of it that was left out.
        survey: of the model, once run.
    """

    survey: ModelTrace

    def __init__(
        self,
        model: nn.Module,
        buffers: Mapping[str, Tensor],
        layers: Sequence[Layer],
        kinds: Sequence[CurvatureType],
        likelihood: FisherOptions,
        runner: Runner,
        seed: int,
    ) -> None:
        """Keeps the arguments; runs nothing.

        Args:
            model: to copy.
            buffers: to give the copy.
            layers: of the model.
            kinds: of curvature, none of them the identity.
            likelihood: with the Fisher type.
            runner: gets logits from the model.
            seed: of all draws.
        """
        self._model, self._buffers, self._layers = model, buffers, layers
        self._kinds, self._likelihood, self._runner = kinds, likelihood, runner
        self._seed = seed
        self.count = 0
        self.trace = self.discarded = 0.0
        self._sums: ModelAccumulator | BackpackDiagonal | None = None
        self._replica: nn.Module | None = None
        self._why_not_backpack = ""

    def run(self, samples: SamplePartition, max_samples: int | None, bar: tqdm[Any]) -> None:
        """Runs all samples from the start, in smaller batches if memory does not suffice.

        Args:
            samples: this process's share.
            max_samples: where to stop if the samples cannot tell.
            bar: of progress.
        """

        def attempt(dealt: SamplePartition) -> None:
            self._sums = None
            self.survey = self._survey(dealt)
            try:
                self._begin(self.survey)
                self._pass(dealt, max_samples, bar)
            except BackpackError as error:
                self._why_not_backpack = str(error)
                attempt(dealt)

        self._samples = _until_it_fits(samples, attempt)
        self._max_samples, self._bar = max_samples, bar

    def finish(self, shard: Shard) -> Found:
        """Adds up over processes and divides, with a second pass first if one is needed.

        Args:
            shard: this process's place.

        Returns:
            Blocks by layer name and treatments, by kind.

        Raises:
            ValueError: if there were no samples.
        """
        sums = self._sums
        assert sums is not None
        assert self._replica is not None
        device = next(self._replica.parameters()).device
        numbers = torch.tensor([self.count, self.trace, self.discarded], dtype=torch.float64)
        if device.type == "mps":  # which has no float64
            numbers = numbers.float()
        totals = shard.total(numbers.to(device)).tolist()
        count = int(totals[0])
        if count == 0:
            raise ValueError("the client holds no samples: there is no curvature to extract")
        if isinstance(sums, BackpackDiagonal):
            blocks: dict[str, Curvature] = {
                name: Diagonal(shard.total(s["values"]) / count) for name, s in sums.sums.items()
            }
            treatments = tuple(LayerReport(layer, "diagonal", "backpack") for layer in self._layers)
            found: Found = {"diagonal": (blocks, treatments)}
        else:
            if "ekfac" in self._kinds:
                self._correct(sums, shard, count)
            found = {
                kind: (sums.finish(kind, shard.total, count), self._treatments(sums, kind))
                for kind in self._kinds
            }
        self.count, (self.trace, self.discarded) = count, totals[1:]
        return found

    def _treatments(self, sums: ModelAccumulator, kind: CurvatureType) -> tuple[LayerReport, ...]:
        treatments = sums.treatments(kind)
        if not self._why_not_backpack:
            return treatments
        because = f"not by BackPACK, as {self._why_not_backpack}"
        return tuple(replace(t, reason=t.reason or because) for t in treatments)

    def _correct(self, sums: ModelAccumulator, shard: Shard, count: int) -> None:
        """Turns factors into eigenbases and finds their spectra, in a second pass if need be."""
        sums.turn(shard.total, shard.first, count)
        if not sums.needs_second_pass:
            sums.correct_kept()
            return
        if not self._samples.again:
            raise ValueError(
                "ekfac of so many samples takes two passes over them, and an iterator has one: "
                'pass a DataLoader or a list of batches, or curvature="kfac"'
            )

        def attempt(dealt: SamplePartition) -> None:
            sums.begin_second_pass()
            self._pass(dealt, self._max_samples, self._bar)

        _until_it_fits(self._samples, attempt)

    def _survey(self, samples: SamplePartition) -> ModelTrace:
        """What one forward pass of a few samples tells about the model."""
        # A copy of its own, lest what the model remembers of this pass is there in the next.
        replica = replicate(self._model, self._buffers)
        batch = self._runner.prepare(replica, samples.preview())
        if samples.count is None:  # the preview is a whole batch
            batch = self._few(replica, batch)
        surveyor = ModelTracer(replica, self._layers)
        with surveyor:
            logits = self._runner.logits(replica, batch)
        if not logits.requires_grad:
            raise ValueError(
                "the model's output is no tensor with a gradient: pass `forward` to return its "
                "logits, and compute them outside torch.no_grad()"
            )
        survey = surveyor.survey(logits)
        if len(survey.unreached) == len(self._layers):
            raise UnsupportedModelError(
                [
                    "no layer of the module's copy has a part in the logits: its forward pass is "
                    "tied to the original, as torch.compile and functions set on an instance do, "
                    "or runs without gradients; fit it uncompiled, or define forward in the class"
                ]
            )
        if survey.unreached:
            raise UnsupportedModelError(
                [
                    f"{name}: no gradient reaches it from the logits (it is detached, its output "
                    "is not used, or reentrant checkpointing hides it): make it a part of them, "
                    "freeze it, or take it out of the module"
                    for name in sorted(survey.unreached)
                ]
            )
        return survey

    def _few(self, replica: nn.Module, batch: Any) -> Any:
        """The first samples of a batch, where it can be cut: a survey runs each on its own."""
        with torch.no_grad():
            samples = len(self._runner.logits(replica, batch))
            few = map_samples(batch, samples, lambda tensor: tensor[:PREVIEW])
            fits = samples > PREVIEW and len(self._runner.logits(replica, few)) == PREVIEW
        return few if fits else batch

    def _begin(self, survey: ModelTrace) -> None:
        replica = self._replica = replicate(self._model, self._buffers)
        if tuple(self._kinds) == ("diagonal",) and not self._why_not_backpack:
            self._why_not_backpack = why_not(replica, self._layers, survey) or ""
            if not self._why_not_backpack:
                self._sums = BackpackDiagonal(replica, self._layers)
                return
        self._sums = ModelAccumulator(
            replica, self._layers, survey, self._kinds, self._runner.logits
        )

    def _pass(self, samples: SamplePartition, max_samples: int | None, bar: tqdm[Any]) -> None:
        assert self._replica is not None
        bar.reset(samples.count)
        uniforms = samples.uniforms(self._seed)
        self.count, self.trace, self.discarded = 0, 0.0, 0.0
        for batch in samples.batches:
            batch = self._runner.prepare(self._replica, batch)
            n = self._batch(batch, uniforms)
            self.count += n
            if samples.indices is not None and self.count > len(samples.indices):
                raise ValueError(
                    "the model gives more rows of logits than there are samples: pass `forward` to "
                    "return one row for each sample"
                )
            bar.update(n)
            if samples.count is None and max_samples is not None and self.count >= max_samples:
                break

    def _batch(self, batch: Any, uniforms: Callable[[int, int], Tensor]) -> int:
        """Runs one batch with all its directions."""
        likelihood = self._likelihood
        # Where the number of directions depends on the logits, these are looked at beforehand.
        beforehand = likelihood.fisher == "exact" or likelihood.draws > 1
        with torch.no_grad() if beforehand else nullcontext():
            logits, labels = self._forward(batch)
        samples = len(logits)
        directions = residual_directions(
            logits,
            labels,
            likelihood.fisher,
            likelihood.name,
            draw=lambda n: uniforms(samples, n),
            draws=likelihood.draws,
            tolerance=likelihood.tolerance,
        )
        self.trace += directions.trace
        self.discarded += directions.discarded
        if beforehand:
            for rows in _alike(directions, samples):
                self._some(batch, logits, directions, rows)
        else:
            self._backward(batch, logits, [directions.first])
        return samples

    def _some(self, batch: Any, logits: Tensor, directions: Directions, rows: Tensor) -> None:
        """Runs some samples of a batch with all their directions."""
        some = map_samples(batch, len(logits), lambda tensor: tensor[rows])
        again, _ = self._forward(some)
        require_same_logits(again, logits, rows)
        self._backward(some, again, directions.of(rows))

    def _backward(self, batch: Any, logits: Tensor, directions: Sequence[Tensor]) -> None:
        assert self._sums is not None
        try:
            self._sums.backward(batch, logits, directions)
        except CheckpointError as error:
            raise UnsupportedModelError(
                [
                    "the model runs parts of itself again in the backward pass: switch gradient "
                    "checkpointing off in eval mode"
                ]
            ) from error

    def _forward(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        assert self._replica is not None
        watch = (
            self._sums.collector.anew()
            if isinstance(self._sums, ModelAccumulator)
            else nullcontext()
        )
        try:
            with watch:
                return self._runner(self._replica, batch)
        except RuntimeError as error:
            if "BackwardHookFunction" in str(error):
                raise BackpackError("an output is changed in place") from error
            raise


def _alike(directions: Directions, samples: int) -> Iterator[Tensor]:
    """Samples with about as many directions, few enough for all their gradients to be kept."""
    counts = directions.counts
    levels = counts.float().log2().ceil().int()
    for level in range(int(levels.max()) + 1):
        indices = (levels == level).nonzero().squeeze(1)
        if len(indices) == 0:
            continue
        most = int(counts[indices].max())
        yield from torch.split(indices, max(1, 3 * samples // (2 * (most + 1))))


def _until_it_fits(
    samples: SamplePartition, attempt: Callable[[SamplePartition], None]
) -> SamplePartition:
    """Tries with ever smaller batches for as long as memory does not suffice."""
    while True:
        try:
            attempt(samples)
            return samples
        except RuntimeError as error:
            size, rebatch = samples.batch_size, samples.rebatch
            if not _is_out_of_memory(error) or rebatch is None or size is None or size == 1:
                raise
        # Outside the handler, which holds on to everything the attempt had.
        rank_zero_warn(
            f"memory did not suffice for batches of {size} samples: the curvature is extracted "
            f"anew in batches of {size // 2}"
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        samples = rebatch(size // 2)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
