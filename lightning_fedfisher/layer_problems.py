"""What a server reads of the updates: the quadratic of one layer at a time, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, distributed

from lightning_fedfisher.curvature import Curvature
from lightning_fedfisher.kronecker import KINDS
from lightning_fedfisher.layers import Layer
from lightning_fedfisher.methods import Method, feeds_softmax
from lightning_fedfisher.quadratic import Quadratic, average
from lightning_fedfisher.sharing import prepared_together
from lightning_fedfisher.spill import Spilled
from lightning_fedfisher.update import ClientUpdate


class LayerProblems:
    """The merge problems of a federation, each read from the updates when asked for."""

    def __init__(self, updates: Sequence[ClientUpdate], method: Method, memory_budget: int) -> None:
        """Reads nothing yet.

        Args:
            updates: of all clients, found to belong together.
            method: tells shares, and what becomes of the curvature.
            memory_budget: bytes to hold at a time.

        Raises:
            ValueError: if the budget is negative.
        """
        if memory_budget < 0:
            raise ValueError(f"memory_budget must be at least 0 bytes, got {memory_budget}")
        self._updates, self._method, self._budget = updates, method, memory_budget
        self._layers = updates[0].layers
        self._shares = [float(update.num_samples) ** method.share_power for update in updates]
        self._averages: dict[str, Tensor] = {}

    def average(self, layer: Layer) -> Tensor:
        """Where the merge of a layer starts: the clients' average by their shares.

        Args:
            layer: one of the updates' layers.

        Returns:
            A matrix of shape ``layer.shape``, in at least float32.
        """
        if layer.name not in self._averages:  # it is asked for at the start of every fit
            weights = self._weights(layer, torch.device("cpu"))
            self._averages[layer.name] = average(self._shares, weights)
        return self._averages[layer.name].clone()

    def read(self, index: int, device: torch.device) -> Quadratic:
        """Reads the quadratic of one layer.

        Args:
            index: of the layer.
            device: where to work.

        Returns:
            The quadratic; its curvature is on disk if it exceeds the budget by itself.
        """
        weights = self._weights(self._layers[index], device)
        prepare = self._preparation(index, device, weights[0].dtype)
        return self._quadratic(index, weights, map(prepare, range(len(weights))))

    def read_together(self, index: int, device: torch.device, owner: int) -> Quadratic | None:
        """Reads the quadratic of one layer with the help of all ranks, each of which must call it.

        Args:
            index: of the layer.
            device: where this rank works.
            owner: the rank that will solve it.

        Returns:
            What `read` does, to the bit, on the owner; None on other ranks.
        """
        weights = self._weights(self._layers[index], device)
        prepare = self._preparation(index, device, weights[0].dtype)
        blocks = prepared_together(len(weights), owner, prepare, device, weights[0].dtype)
        if distributed.get_rank() == owner:
            return self._quadratic(index, weights, blocks)
        for _ in blocks:
            pass
        return None

    def _preparation(
        self, index: int, device: torch.device, dtype: torch.dtype
    ) -> Callable[[int], Curvature]:
        """What makes a client's curvature of a layer into that of the merge."""
        layer = self._layers[index]

        def block(client: int) -> Curvature:
            return self._updates[client].block(layer).to(device, dtype)

        # The head is the last layer, if it does what a head does.
        clients = range(len(self._updates))
        head = index == len(self._layers) - 1 and all(map(feeds_softmax, map(block, clients)))
        return lambda client: self._method.transform(block(client), head)

    def _quadratic(
        self, index: int, weights: Sequence[Tensor], curvatures: Iterable[Curvature]
    ) -> Quadratic:
        if self._size(index) > self._budget:
            return Quadratic(self._shares, weights, Spilled(curvatures, weights[0].device))
        return Quadratic(self._shares, weights, list(curvatures))

    def fits(self, index: int, held: Iterable[int]) -> bool:
        """Whether there is room for a layer beside others.

        Args:
            index: of the layer.
            held: indices of layers in memory.

        Returns:
            True as well if there are no others: a layer alone may exceed the budget, on disk.
        """
        others = sum(map(self._size, held))
        return others == 0 or others + self._size(index) <= self._budget

    def _size(self, index: int) -> int:
        """Bytes of all clients' weights and curvature of a layer, as they are worked with."""
        layer, first = self._layers[index], self._updates[0]
        kind = KINDS[first.header.kinds[layer.name]]
        parts = (layer.shape, *kind.tensor_shapes(layer.shape).values())
        return len(self._updates) * _WIDTH * sum(map(math.prod, parts))

    def _weights(self, layer: Layer, device: torch.device) -> list[Tensor]:
        """One layer's matrix from every update, in at least float32."""
        weights = [update.weights(layer) for update in self._updates]
        dtype = torch.promote_types(weights[0].dtype, torch.float32)
        return [matrix.to(device, dtype) for matrix in weights]


# Bytes of a number; float64 updates are the exception.
_WIDTH = 4
