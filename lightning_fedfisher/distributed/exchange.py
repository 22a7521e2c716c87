"""Items that all ranks make by turns for the one rank that needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed


class Item(NamedTuple):
    """What crosses between ranks.

    Attributes:
        label: Anything small that tells what the tensors are.
        tensors: The tensors by name.
    """

    label: Any
    tensors: Mapping[str, Tensor]

    def to(self, device: torch.device) -> Item:
        """Moves the tensors to a device."""
        return Item(self.label, {name: tensor.to(device) for name, tensor in self.tensors.items()})


def gather_at_owner(
    count: int, owner: int, make: Callable[[int], Item], device: torch.device
) -> Iterator[Item]:
    """Makes items by turns on all ranks, for the one that owns them; every rank must iterate.

    A rank holds one item at a time, and sends it on before it makes the next.

    Args:
        count: Number of items.
        owner: The rank that gets them all.
        make: Makes the item of an index.
        device: Where this rank works.

    Yields:
        On the owner every item, in order of their indices; nothing on the other ranks.
    """
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    for index in range(count):
        maker = (owner + index) % ranks
        if rank == maker == owner:
            yield make(index)
        elif rank == maker:
            # On the CPU, or the owner would unpickle it onto this rank's device.
            distributed.send_object_list([make(index).to(torch.device("cpu"))], owner)
        elif rank == owner:
            received: list[Any] = [None]
            distributed.recv_object_list(received, maker)
            yield received[0].to(device)
