"""Curvature that all ranks prepare beforehand, so that none waits while another decomposes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.curvature.registry import KINDS
from lightning_fedfisher.distributed.assignment import assign_layers, oversized_layers
from lightning_fedfisher.distributed.exchange import Item, gather_at_owner
from lightning_fedfisher.merge.disk_cache import OnDiskCurvatures
from lightning_fedfisher.merge.layer_loader import LayerLoader


def prepare_by_ranks(
    loader: LayerLoader, unsolved: Sequence[int], rank: int, ranks: int, device: torch.device
) -> dict[int, OnDiskCurvatures]:
    """Reads and transforms the curvature of layers that would have to wait for others.

    An aligned layer's turn comes late. Until then its rank would be idle, so it prepares the layer
    first and keeps it on disk. A layer that costs more than an equal part of all is prepared by all
    ranks together. Every rank must call this.

    Args:
        loader: The loader of the merge.
        unsolved: Indices of the layers that are not merged yet.
        rank: The rank of this process.
        ranks: Number of processes.
        device: Where this rank works.

    Returns:
        By the index of a layer that this rank owns, the clients' curvature.
    """
    shapes = [layer.shape for layer in loader.layers]
    together = oversized_layers(shapes, ranks)
    prepared: dict[int, OnDiskCurvatures] = {}
    for index in unsolved:
        if index in together:
            curvatures = _gathered(loader, index, together[index], device)
            offloaded = loader.offload(index, curvatures, device)
            if rank == together[index]:
                prepared[index] = offloaded
    for index in assign_layers(shapes, ranks)[rank]:
        waits = loader.alignments.waits_for(index) is not None
        if index in unsolved and index not in together and waits:
            prepared[index] = loader.offload(index, loader.curvatures(index, device), device)
    return prepared


def _gathered(
    loader: LayerLoader, index: int, owner: int, device: torch.device
) -> Iterator[Curvature]:
    """The clients' curvature of a layer, made by all ranks, at its owner alone."""

    def make(client: int) -> Item:
        curvature = loader.curvature(index, client, device)
        return Item((curvature.kind, curvature.shape, curvature.kernel), curvature.tensors())

    for item in gather_at_owner(len(loader.updates), owner, make, device):
        kind, shape, kernel = item.label
        yield KINDS[kind].from_tensors(item.tensors, shape, kernel)
