"""Writes per-sample gradients out, in chunks of samples, where that is worth its memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from lightning_fedfisher.extraction.layer_types.base import KroneckerLayer, SparseLayer
from lightning_fedfisher.extraction.tracing.recorder import LayerCall

# Entries of the intermediate tensors of a chunk of samples: 8 MB in float32, which fits the cache
# of most processors and is no memory to speak of.
_CHUNK_NUMEL = 2**21
# How many times as large as its calls' inputs and gradients a layer's per-sample gradients may be,
# to be written out once rather than every time they are needed.
_MAX_EXPANSION = 8


def in_chunks(
    calls: Sequence[LayerCall], samples: int, entries_per_gradient: int = 0
) -> Iterator[tuple[list[LayerCall], int]]:
    """Splits calls into chunks of samples, so that intermediate tensors stay small.

    Args:
        calls: Calls of one layer.
        samples: Number of samples that each of them has.
        entries_per_gradient: Entries that every gradient of a sample takes besides: as many as the
            layer's matrix has if it is written out, or 0.

    Yields:
        The same calls of some samples, and the number of these.
    """
    numel = sum(call.layer_type.peak_numel(call.inputs, call.gradients) for call in calls)
    directions = len(calls[0].gradients)
    step = _CHUNK_NUMEL * samples // max(numel, entries_per_gradient * samples * directions, 1)
    step = max(1, step)
    for start in range(0, samples, step):
        stop = min(start + step, samples)
        yield [call.select(start, stop, samples) for call in calls], stop - start


def per_sample_gradients(calls: Sequence[LayerCall], samples: int) -> Tensor:
    """Computes per-sample gradients, added up over the calls of a layer.

    Args:
        calls: Calls of one layer in one forward pass.
        samples: Number of samples.

    Returns:
        A tensor of shape ``(samples * directions, rows, columns)``.

    Example:
        >>> import torch
        >>> from lightning_fedfisher.extraction.layer_types.linear import Linear
        >>> call = LayerCall(Linear(has_bias=True), torch.ones(4, 2), torch.ones(1, 4, 3))
        >>> per_sample_gradients([call, call], samples=4).shape
        torch.Size([4, 3, 3])
    """
    total, *others = (
        call.layer_type.per_sample_gradients(call.inputs, call.gradients, samples) for call in calls
    )
    for gradients in others:
        total = total + gradients
    return total


def is_outer_product(calls: Sequence[LayerCall], samples: int) -> bool:
    """Tells whether a sample's gradient is the outer product of two vectors, over all calls."""
    (call, *others) = calls
    return not others and call.layer_type.is_outer_product(call.inputs, samples)


def materialized_gradients(
    calls: Sequence[LayerCall], samples: int, shape: tuple[int, int]
) -> list[Tensor] | None:
    """Writes per-sample gradients out, if that saves work and does not take too much memory.

    It does not save work if they are outer products of two vectors, mostly zero, or sums over so
    few positions that the two sides of the product are cheaper to handle than the product.

    Args:
        calls: Calls of one layer in one forward pass.
        samples: Number of samples.
        shape: Shape ``(rows, columns)`` of the layer's matrix.

    Returns:
        Tensors of shape ``(samples * directions, rows, columns)``, one for each chunk of samples.
        None if the calls are better kept as they are.
    """
    if is_outer_product(calls, samples):
        return None
    if any(isinstance(call.layer_type, SparseLayer) for call in calls):
        return None
    entries, directions = shape[0] * shape[1], len(calls[0].gradients)
    given = sum(call.inputs.numel() + call.gradients.numel() for call in calls)
    if entries * samples * directions > _MAX_EXPANSION * given:
        return None
    positions = sum(call.gradients.numel() for call in calls) // (samples * directions * shape[0])
    if isinstance(calls[0].layer_type, KroneckerLayer) and positions < shape[0] * directions:
        return None
    return [per_sample_gradients(chunk, n) for chunk, n in in_chunks(calls, samples, entries)]
