"""What a forward pass of a few samples tells about a model, before any pass over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_fedfisher.errors import UnsupportedModelError
from lightning_fedfisher.extraction.batches import (
    BatchRunner,
    is_out_of_memory,
    map_samples,
    require_same_logits,
)
from lightning_fedfisher.extraction.model_copy import copy_around_parameters
from lightning_fedfisher.extraction.sampling import PREVIEW, SamplePartition
from lightning_fedfisher.extraction.tracing.model_trace import ModelTrace, ModelTracer
from lightning_fedfisher.layers import Layer


def trace_model(
    model: nn.Module, layers: Sequence[Layer], runner: BatchRunner, samples: SamplePartition
) -> ModelTrace:
    """Traces a model on a few samples, and refuses one that has no curvature of a sample.

    Args:
        model: A copy of the model. What is run is a copy around its parameters: what the model
            remembers of a forward pass, in a buffer or a cache, must not be there in the next one.
        layers: Its layers.
        runner: Runs it.
        samples: The samples, a few of which are previewed.

    Returns:
        What the forward passes showed.

    Raises:
        UnsupportedModelError: If no gradient reaches any layer, or samples depend on each other.
        ValueError: If the output has no gradient.
    """
    batch = runner.prepare(model, samples.preview())
    if samples.count is None:  # the preview is a whole batch
        batch = _few(copy_around_parameters(model), runner, batch)
    _require_independence(copy_around_parameters(model), runner, batch)
    traced = _trace_batch(copy_around_parameters(model), layers, runner, batch)
    unreached, uncalled = traced.unreached, traced.uncalled
    if len(unreached) == len(layers):
        raise UnsupportedModelError(
            [
                "no layer of the module's copy has a part in the logits: its forward pass is "
                "tied to the original, as torch.compile and functions set on an instance do, "
                "or runs without gradients; fit it uncompiled, or define forward in the class"
            ]
        )
    hidden = _without_gradients(model, runner, batch) & unreached.keys() if unreached else ()
    if hidden:
        raise UnsupportedModelError(
            [
                f"{name}: it runs without gradients (in reentrant checkpointing, or under "
                "torch.no_grad): pass use_reentrant=False to the checkpoint, or freeze it"
                for name in sorted(hidden)
            ]
        )
    if unreached:  # a head that only the loss of training knows, a weight of that loss
        layers = [layer for layer in layers if layer.name not in unreached]
        traced = _trace_batch(copy_around_parameters(model), layers, runner, batch)
    if traced.spreadable:
        traced = _trace_batch(
            copy_around_parameters(model), layers, runner, batch, traced.spreadable
        )
    return replace(traced, unreached=unreached, uncalled=uncalled)


@torch.no_grad()
def _require_independence(model: nn.Module, runner: BatchRunner, batch: Any) -> None:
    """Refuses a model whose logits of the first sample depend on the others of its batch."""
    logits = runner.logits(model, batch)
    try:
        first = map_samples(batch, len(logits), lambda tensor: tensor[:1])
        alone = runner.logits(model, first)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        return  # a batch of another form, or a model that takes no single sample: none can tell
    if len(alone) == 1:
        require_same_logits(alone, logits, slice(0, 1))


def _trace_batch(
    model: nn.Module,
    layers: Sequence[Layer],
    runner: BatchRunner,
    batch: Any,
    spread: frozenset[str] = frozenset(),
) -> ModelTrace:
    """Traces one forward pass."""
    tracer = ModelTracer(model, layers, spread)
    with tracer.watch():
        logits = runner.logits(model, batch)
    if not logits.requires_grad:
        raise ValueError(
            "the model's output is no tensor with a gradient: pass forward= to return its "
            "logits, and compute them outside torch.no_grad()"
        )
    return tracer.trace(logits)


def _without_gradients(model: nn.Module, runner: BatchRunner, batch: Any) -> set[str]:
    """Names of the layers, by their modules, that a forward pass runs with gradients off."""
    found: set[str] = set()

    def note(path: str, *_: object) -> None:
        if not torch.is_grad_enabled():
            found.add(path)

    watched = copy_around_parameters(model)
    for path, module in watched.named_modules():
        module.register_forward_pre_hook(partial(note, path))
    runner.logits(watched, batch)
    return found


def _few(model: nn.Module, runner: BatchRunner, batch: Any) -> Any:
    """Takes the first samples of a batch, if it can be cut: tracing runs each on its own."""
    with torch.no_grad():
        samples = len(runner.logits(model, batch))
        few = map_samples(batch, samples, lambda tensor: tensor[:PREVIEW])
        fits = samples > PREVIEW and len(runner.logits(model, few)) == PREVIEW
    return few if fits else batch
