"""Extraction: a pass over the client's samples turns a trained model into curvature."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack

from torch import nn
from tqdm import tqdm
from typing_extensions import override

from lightning_fedfisher.curvature.base import Curvature, Identity
from lightning_fedfisher.extraction.batches import Forward, Runner, isolated
from lightning_fedfisher.extraction.data_pass import DataPass, FisherOptions
from lightning_fedfisher.extraction.fisher_types import FISHER_TYPES, FisherType
from lightning_fedfisher.extraction.layer_report import (
    CURVATURE_TYPES,
    CurvatureType,
    LayerReport,
    describe,
)
from lightning_fedfisher.extraction.sampling import MaxSamples, Shard, partition_samples
from lightning_fedfisher.layers import Layer, Source, find_layers
from lightning_fedfisher.likelihoods.registry import LIKELIHOODS
from lightning_fedfisher.update.header import UpdateHeader


class ExtractionOptions(TypedDict, total=False):
    """Options of an extraction; every one may be left out.

    Attributes:
        fisher: ``"normalised"`` (default), ``"exact"``, ``"mc"`` or ``"empirical"`` (see
            `likelihood`).
        likelihood: of the labels given the logits: ``"categorical"`` (default; any number of
            positions after the classes, unobserved ones labelled -100), ``"bernoulli"`` or
            ``"gaussian"``.
        max_samples: average over a seeded random subset of this size; ``"auto"`` (default) takes
            every twelfth sample but no fewer than 300, None takes all. Of an iterable without
            indices, the first samples, to the batch; ``"auto"`` takes all of it.
        batch_size: samples a batch, the loader's own by default. Halved, with a warning, for as
            long as memory does not suffice.
        seed: of the subset and of all draws.
        draws: directions a sample, for the Fisher types that draw; 1 by default.
        tolerance: share of each batch's trace that the exact type may leave out; 5e-6 by default.
        forward: maps ``(module, batch)`` to logits, or to ``(logits, labels)``.
        prepare: applied to each batch first, where the loader's are not what the model is given.
        shard: this process's place among several; sums are reduced once at the end.
        progress: show a progress bar, after two seconds, on rank 0 and on a terminal (default).
        on_progress: told on every rank how many of its samples are done, and of how many.
    """

    fisher: FisherType
    likelihood: str
    max_samples: MaxSamples
    batch_size: int | None
    seed: int
    draws: int
    tolerance: float
    forward: Forward | None
    prepare: Callable[[Any], Any] | None
    shard: Shard | None
    progress: bool
    on_progress: Callable[[int, int | None], None] | None


@dataclass(frozen=True)
class ExtractedCurvature:
    """The curvature of a trained model.

    Attributes:
        kind: of curvature, as asked for.
        likelihood: with the Fisher type.
        layers: the layers of the model, which cover each trained parameter exactly once.
        blocks: the curvature of each layer, by layer name.
        treatments: how each layer was treated, and why.
        num_samples: samples the curvature is averaged over, over all processes.
        population: samples the client holds; None where the loader cannot tell.
        seconds: wall-clock time of the extraction.
        discarded: share of the Fisher's trace, in the space of the logits, that was left out.
        fed_by: whose outputs each layer reads, for those that read one other layer's.
        output_layer: name of the layer whose outputs are the logits; empty if none is.
    """

    kind: CurvatureType
    likelihood: FisherOptions
    layers: tuple[Layer, ...]
    blocks: Mapping[str, Curvature]
    treatments: tuple[LayerReport, ...]
    num_samples: int
    population: int | None
    seconds: float
    discarded: float = 0.0
    fed_by: Mapping[str, Source] = field(default_factory=dict)
    output_layer: str = ""

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the parameters covered, in the order of the layers."""
        return tuple(name for layer in self.layers for name in layer.parameter_names)

    @property
    def report(self) -> str:
        """How the layers were treated, and which one is the output layer, in a few lines."""
        output_layer = (
            f"output layer: {self.output_layer}"
            if self.output_layer
            else "no output layer: the logits are no layer's outputs"
        )
        return f"{describe(self.treatments)}\n{output_layer}"

    def header(
        self, num_samples: int | None = None, metadata: Mapping[str, str] | None = None
    ) -> UpdateHeader:
        """What an update that sends this curvature says of it.

        Args:
            num_samples: training samples the client holds; those the loader counts if None.
            metadata: anything to send along, as strings.

        Returns:
            The header, for `ClientUpdate.from_model`.
        """
        return UpdateHeader(
            num_samples=num_samples or self.population or 0,
            curvature=self.kind,
            fisher="" if self.kind == "identity" else self.likelihood.fisher,
            likelihood=self.likelihood.name,
            curvature_samples=self.num_samples,
            layers=self.layers,
            kinds={name: block.kind for name, block in self.blocks.items()},
            metadata=dict(metadata or {}),
            fed_by=self.fed_by,
            output_layer=self.output_layer if LIKELIHOODS[self.likelihood.name].softmax else "",
        )


def check_options(curvature: str, fisher: str, likelihood: str) -> None:
    """Refuses unknown options, all at once.

    Args:
        curvature: kind of curvature.
        fisher: Fisher type.
        likelihood: of the labels.

    Raises:
        ValueError: naming each unknown option and what is known.
    """
    wrong = [
        f"{name}={given!r} is not one of {', '.join(known)}"
        for name, given, known in (
            ("curvature", curvature, CURVATURE_TYPES),
            ("fisher", fisher, FISHER_TYPES),
            ("likelihood", likelihood, LIKELIHOODS),
        )
        if given not in known
    ]
    if wrong:
        raise ValueError("; ".join(wrong))


def extract_curvature(
    model: nn.Module,
    dataloader: Iterable[Any],
    kind: CurvatureType = "kfac",
    **options: Unpack[ExtractionOptions],
) -> ExtractedCurvature:
    """Extracts the curvature of the loss around a trained model.

    Args:
        model: maps the first element of a batch to logits, unless `forward` says otherwise. It is
            left as it was: weights, gradients, hooks, mode, devices and random state.
        dataloader: batches ``(x, y)`` of the client's own training samples, un-augmented if
            possible. A `DataLoader` is read once through, each sample once, in a fixed order
            (twice for ``"ekfac"`` if what it keeps in between would take more than a gigabyte).
        kind: ``"identity"`` (no pass at all), ``"diagonal"``, ``"kfac"``, ``"ekfac"`` or
            ``"dense"``. A layer without Kronecker factors gets an exact diagonal instead.
        **options: see `ExtractionOptions`.

    Returns:
        The curvature of every layer, averaged over the samples, on the model's device.

    Raises:
        UnsupportedModelError: if a parameter would be left out or counted wrongly.
        ValueError: if an option, a batch or the model's output is unusable.
    """
    return extract_curvatures(model, dataloader, (kind,), **options)[kind]


def extract_curvatures(
    model: nn.Module,
    dataloader: Iterable[Any],
    kinds: Sequence[CurvatureType],
    **options: Unpack[ExtractionOptions],
) -> dict[CurvatureType, ExtractedCurvature]:
    """Extracts several kinds of curvature in one pass.

    Args:
        model: as in `extract_curvature`.
        dataloader: the client's samples.
        kinds: any of the kinds.
        **options: see `ExtractionOptions`.

    Returns:
        What was extracted, by kind.

    Raises:
        UnsupportedModelError: if a parameter would be left out or counted wrongly.
        ValueError: if an option, a batch or the model's output is unusable.
    """
    likelihood = FisherOptions(
        options.get("likelihood", "categorical"),
        options.get("fisher", "normalised"),
        options.get("draws", 1),
        options.get("tolerance", 5e-6),
    )
    for kind in kinds:
        check_options(kind, likelihood.fisher, likelihood.name)
    if likelihood.draws < 1:
        raise ValueError(f"draws must be at least 1, got {likelihood.draws}")
    if not 0 <= likelihood.tolerance < 1:
        raise ValueError(f"tolerance must lie in [0, 1), got {likelihood.tolerance}")
    shard = options.get("shard") or Shard()
    max_samples, seed = options.get("max_samples", "auto"), options.get("seed", 0)
    layers = find_layers(model)
    started = time.perf_counter()
    samples = partition_samples(
        dataloader,
        max_samples=max_samples,
        batch_size=options.get("batch_size"),
        seed=seed,
        shard=shard,
    )
    found: dict[CurvatureType, ExtractedCurvature] = {}
    if "identity" in kinds:
        same = {layer.name: Identity(layer.shape) for layer in layers}
        none = tuple(LayerReport(layer, "identity", "none") for layer in layers)
        found["identity"] = ExtractedCurvature(
            "identity", likelihood, layers, same, none, 0, samples.population, 0.0
        )
    passing: list[CurvatureType] = [kind for kind in kinds if kind != "identity"]
    if not passing:
        return found
    sweep = DataPass(
        model,
        # Under DDP running statistics differ, and the first process's are sent.
        {name: shard.first(buffer) for name, buffer in model.named_buffers()}
        if shard.world_size > 1
        else {},
        layers,
        passing,
        likelihood,
        Runner(options.get("forward"), options.get("prepare")),
        seed,
    )
    with (
        isolated(model),
        _Bar(
            options.get("on_progress"),
            desc=f"{likelihood.fisher} {' and '.join(passing)} curvature",
            unit=" samples",
            unit_scale=shard.world_size,
            delay=2,
            # None: shown on a terminal only.
            disable=None if options.get("progress", True) and shard.rank == 0 else True,
        ) as bar,
    ):
        sweep.run(samples, max_samples if isinstance(max_samples, int) else None, bar)
        extracted = sweep.finish(shard)
    seconds = time.perf_counter() - started
    for kind, (blocks, treatments) in extracted.items():
        found[kind] = ExtractedCurvature(
            kind,
            likelihood,
            layers,
            blocks,
            treatments,
            sweep.count,
            samples.population,
            seconds,
            sweep.discarded / sweep.trace if sweep.trace else 0.0,
            sweep.survey.fed_by,
            sweep.survey.output_layer,
        )
    return found


class _Bar(tqdm):  # type: ignore[type-arg]
    """A progress bar that tells of its progress, shown or not."""

    def __init__(self, tell: Callable[[int, int | None], None] | None, **options: Any) -> None:
        self._tell, self._done = tell, 0
        super().__init__(**options)

    @override
    def reset(self, total: float | None = None) -> None:
        self._done = 0
        super().reset(total)

    @override
    def update(self, n: float | None = 1) -> bool | None:
        self._done += int(n or 0)
        if self._tell is not None:
            self._tell(self._done, None if self.total is None else int(self.total))
        return super().update(n)
