"""Extraction: one pass over a client's samples turns a trained model into curvature."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Unpack

from torch import nn

from lightning_fedfisher._utils.unwrapping import unwrapped
from lightning_fedfisher.batch_norms import RunningStatistics
from lightning_fedfisher.curvature.base import Identity
from lightning_fedfisher.curvature.registry import CurvatureType
from lightning_fedfisher.distributed.processes import Shard
from lightning_fedfisher.distributed.progress import samples_bar
from lightning_fedfisher.extraction.data_pass import DataPass
from lightning_fedfisher.extraction.held_losses import options_by_losses
from lightning_fedfisher.extraction.layer_report import LayerReport
from lightning_fedfisher.extraction.model_copy import isolated
from lightning_fedfisher.extraction.options import ExtractionOptions, OptionOverrides
from lightning_fedfisher.extraction.result import ExtractedCurvature
from lightning_fedfisher.extraction.sampling import partition_samples
from lightning_fedfisher.extraction.tracing.model_trace import ModelTrace
from lightning_fedfisher.layers import find_layers


def extract_curvature(
    model: nn.Module,
    dataloader: Iterable[Any],
    curvature: CurvatureType | None = None,
    options: ExtractionOptions | None = None,
    *,
    prepare: Callable[[Any], Any] | None = None,
    shard: Shard | None = None,
    trace: ModelTrace | None = None,
    progress: bool = True,
    on_progress: Callable[[int, int | None], None] | None = None,
    **overrides: Unpack[OptionOverrides],
) -> ExtractedCurvature:
    """Extracts the curvature of the loss around a trained model.

    Args:
        model: The trained model. It maps the first element of a batch to logits, unless `forward`
            says otherwise. It is left as it was: weights, gradients, hooks, mode, devices and
            random state.
        dataloader: Batches ``(x, y)`` of the client's own training samples, without augmentation if
            possible. A `DataLoader` is read once through, each sample once, in a fixed order
            (twice for ``"ekfac"`` if what it keeps in between would take more than a gigabyte).
        curvature: Kind of curvature: ``"identity"``, ``"diagonal"``, ``"input_gram"``, ``"kfac"``,
            ``"ekfac"`` or ``"dense"``; None takes that of the options, ``"kfac"`` by default.
        options: All options at once; None takes the defaults of `ExtractionOptions`.
        prepare: Function applied to each batch first, where the loader's batches are not what the
            model is given; None leaves them as they are.
        shard: The place of this process among several that extract together, each of which calls
            this function. Sums are reduced once at the end. None stands for a single process.
        trace: The trace of an earlier extraction from the same model, which spares another one. A
            model that turns out to have changed is traced anew. None traces it.
        progress: Whether to show a progress bar, after two seconds, on rank 0 and on a terminal.
        on_progress: Function called on every rank after each batch, with the number of its samples
            that are done and the number of all its samples, None if the loader cannot tell.
        **overrides: Single options in place of those of `options`, by their names: ``fisher``,
            ``likelihood``, ``max_samples``, ``batch_size``, ``seed``, ``positions``, ``draws``,
            ``tolerance``, ``forward``, ``ignore_index`` and ``estimate_statistics`` (see
            `ExtractionOptions`).

    Returns:
        The curvature of every layer, averaged over the samples, on the model's device.

    Raises:
        UnsupportedModelError: If a parameter would be left out or counted wrongly.
        ValueError: If an option, a batch or the model's output is unusable.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> batches = [(torch.eye(2), torch.tensor([0, 1]))]
        >>> found = extract_curvature(model, batches, "kfac", fisher="exact")
        >>> {name: block.kind for name, block in found.blocks.items()}
        {'0': 'kronecker', '2': 'kronecker'}
        >>> print(found.report)
        kronecker (hooks): 2 layers, 17 weights: 0, 2
        output layer: 2
    """
    kind = curvature or (options or ExtractionOptions()).curvature
    found = extract_curvatures(
        model,
        dataloader,
        (kind,),
        options,
        prepare=prepare,
        shard=shard,
        trace=trace,
        progress=progress,
        on_progress=on_progress,
        **overrides,
    )
    return found[kind]


def extract_curvatures(
    model: nn.Module,
    dataloader: Iterable[Any],
    curvatures: Sequence[CurvatureType],
    options: ExtractionOptions | None = None,
    *,
    prepare: Callable[[Any], Any] | None = None,
    shard: Shard | None = None,
    trace: ModelTrace | None = None,
    progress: bool = True,
    on_progress: Callable[[int, int | None], None] | None = None,
    **overrides: Unpack[OptionOverrides],
) -> dict[CurvatureType, ExtractedCurvature]:
    """Extracts several kinds of curvature in one pass over the samples.

    Args:
        model: The trained model (see `extract_curvature`).
        dataloader: Batches of the client's own training samples.
        curvatures: The kinds of curvature wanted, in place of that of the options.
        options: All options at once; None takes the defaults of `ExtractionOptions`.
        prepare: Function applied to each batch first; None leaves batches as they are.
        shard: The place of this process among several; None stands for a single process.
        trace: The trace of an earlier extraction from the same model; None traces it.
        progress: Whether to show a progress bar.
        on_progress: Function called after each batch (see `extract_curvature`).
        **overrides: Single options in place of those of `options`, by their names.

    Returns:
        What was extracted, by kind of curvature.

    Raises:
        UnsupportedModelError: If a parameter would be left out or counted wrongly.
        ValueError: If an option, a batch or the model's output is unusable.

    Example:
        >>> import torch
        >>> batches = [(torch.eye(2), torch.tensor([0, 1]))]
        >>> found = extract_curvatures(nn.Linear(2, 2), batches, ("diagonal", "kfac"), seed=1)
        >>> list(found)
        ['diagonal', 'kfac']
    """
    options = options or ExtractionOptions()
    # Each is checked whole, so that an unknown kind and an unknown option are told together.
    asked = {kind: replace(options, curvature=kind, **overrides) for kind in curvatures}
    options = replace(options, **overrides)
    shard = shard or Shard()
    model = unwrapped(model)
    layers = find_layers(model)
    if any(kind != "identity" for kind in asked):
        options = options_by_losses(model, options)
    started = time.perf_counter()
    samples = partition_samples(
        dataloader,
        max_samples=options.max_samples,
        batch_size=options.batch_size,
        seed=options.seed,
        shard=shard,
    )
    found: dict[CurvatureType, ExtractedCurvature] = {}
    if "identity" in asked:
        identities = {layer.name: Identity(layer.shape) for layer in layers}
        reports = tuple(LayerReport(layer, "identity", "none") for layer in layers)
        found["identity"] = ExtractedCurvature(
            asked["identity"], layers, identities, reports, 0, samples.population, 0.0
        )
    extracted = [kind for kind in asked if kind != "identity"]
    if not extracted:
        return found
    with (
        isolated(model),
        samples_bar(f"{' and '.join(extracted)} curvature", shard, progress) as bar,
    ):
        data_pass = DataPass(
            model,
            layers,
            extracted,
            options,
            shard=shard,
            trace=trace,
            prepare=prepare,
            bar=bar,
            on_progress=on_progress,
        )
        data_pass.run(samples)
        blocks = data_pass.finish()
    seconds = time.perf_counter() - started
    for kind, (by_layer, reports) in blocks.items():
        found[kind] = ExtractedCurvature(
            asked[kind],
            layers,
            by_layer,
            reports,
            data_pass.count,
            samples.population,
            seconds,
            data_pass.discarded / data_pass.trace if data_pass.trace else 0.0,
            data_pass.model_trace.fed_by,
            data_pass.model_trace.output_layer,
            data_pass.model_trace,
            statistics=data_pass.statistics or RunningStatistics(),
        )
    return found
