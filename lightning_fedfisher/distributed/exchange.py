"""Curvature prepared by all ranks for the one that owns the layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import distributed

from lightning_fedfisher.curvature.base import Curvature


def prepared_together(
    clients: int,
    owner: int,
    prepare: Callable[[int], Curvature],
    device: torch.device,
) -> Iterator[Curvature]:
    """Prepares the clients' curvature of a layer by turns; every rank must go through it.

    A rank holds one client's at a time, and sends it on before it prepares the next.

    Args:
        clients: how many there are.
        owner: the rank that takes it all.
        prepare: makes the curvature of a client.
        device: where this rank works.

    Yields:
        On the owner the curvature of every client, in their order; nothing on other ranks.
    """
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    for client in range(clients):
        maker = (owner + client) % ranks
        if rank == maker == owner:
            yield prepare(client)
        elif rank == maker:
            # On the CPU, or the owner would unpickle it onto this rank's device.
            distributed.send_object_list([_moved(prepare(client), torch.device("cpu"))], owner)
        elif rank == owner:
            received: list[Any] = [None]
            distributed.recv_object_list(received, maker)
            yield _moved(received[0], device)


def _moved(curvature: Curvature, device: torch.device) -> Curvature:
    moved = {name: tensor.to(device) for name, tensor in curvature.tensors().items()}
    return curvature.from_tensors(moved, curvature.shape)
