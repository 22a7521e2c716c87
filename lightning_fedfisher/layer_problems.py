"""What a server reads of the updates: the quadratic of one layer at a time, in bounded memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_fedfisher.alignment import Alignment, align
from lightning_fedfisher.curvature import Curvature
from lightning_fedfisher.input_map import InputMap
from lightning_fedfisher.kronecker import KINDS
from lightning_fedfisher.layers import Activation, Layer
from lightning_fedfisher.methods import Method
from lightning_fedfisher.quadratic import Quadratic, average
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
        self._sizes = list(map(self._sent, self._layers))
        self._related: dict[tuple[int, Activation], list[tuple[Tensor, Tensor]]] = {}

    def forget(self) -> None:
        """Lets go of what was found out from merged layers, as before they are merged anew."""
        self._related.clear()

    def average(self, layer: Layer) -> Tensor:
        """Where the merge of a layer starts: the clients' average by their shares.

        Args:
            layer: one of the updates' layers.

        Returns:
            A matrix of shape ``layer.shape``, in at least float32.
        """
        return average(self._shares, self._weights(layer, torch.device("cpu")))

    def waits_for(self, index: int) -> int | None:
        """The layer that has to be merged before.

        Args:
            index: of the layer.

        Returns:
            Its index; None if there is none, as with methods that do not align.
        """
        edge = self._source(index)
        return None if edge is None else edge[0]

    def read(self, index: int, device: torch.device, merged: Sequence[Tensor]) -> Quadratic:
        """Reads the quadratic of one layer.

        Args:
            index: of the layer.
            device: where to work.
            merged: the merged matrices, of which those it waits for are solved.

        Returns:
            The quadratic; its curvature, if there is any, is on disk where the layer exceeds the
            budget by itself.
        """
        layer = self._layers[index]
        head = layer.name == self._updates[0].header.head
        alignments = self._alignments(index, device, merged)
        weights = self._weights(layer, device)
        if alignments:
            weights = [a.weights(w) for a, w in zip(alignments, weights, strict=True)]

        def blocks() -> Iterator[Curvature]:
            for client, update in enumerate(self._updates):
                block = update.block(layer).to(device, weights[0].dtype)
                block = self._method.transform(block, head)
                yield alignments[client].curvature(block) if alignments else block

        curvatures = blocks()
        first = next(curvatures)
        tensors = list(first.tensors().values())
        self._sizes[index] = len(weights) * sum(t.nbytes for t in (weights[0], *tensors))
        every = itertools.chain([first], curvatures)
        beyond = bool(tensors) and self._sizes[index] > self._budget
        kept = Spilled(every, device) if beyond else list(every)
        return Quadratic(self._shares, weights, kept)

    def fits(self, index: int, held: Iterable[int]) -> bool:
        """Whether there is room for a layer beside others.

        Args:
            index: of the layer.
            held: indices of layers in memory.

        Returns:
            True as well if there are no others: a layer alone may exceed the budget, on disk.
        """
        others = sum(self._sizes[other] for other in held)
        return others == 0 or others + self._sizes[index] <= self._budget

    def _source(self, index: int) -> tuple[int, Activation] | None:
        """The layer whose outputs another reads, if both sides tell how to align them."""
        header, layer = self._updates[0].header, self._layers[index]
        source = header.sources.get(layer.name)
        if source is None or not self._method.aligns:
            return None
        if not all(KINDS[header.kinds[name]].holds_inputs for name in (layer.name, source.layer)):
            return None
        names = [each.name for each in self._layers]
        return names.index(source.layer), source.activation

    def _alignments(
        self, index: int, device: torch.device, merged: Sequence[Tensor]
    ) -> list[Alignment]:
        """How a layer's inputs relate to the merged model's, by client; empty if not known."""
        edge = self._source(index)
        if edge is None:
            return []
        if edge not in self._related:
            self._related[edge] = list(self._relate(*edge, device, merged))
        inputs = self._layers[index].inputs
        return [
            Alignment(InputMap(to_client, inputs), InputMap(to_merged, inputs))
            for to_client, to_merged in self._related[edge]
        ]

    def _relate(
        self, index: int, activation: Activation, device: torch.device, merged: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """How the outputs of a merged layer relate to each client's."""
        layer, alignments = self._layers[index], self._alignments(index, device, merged)
        for client, weights in enumerate(self._weights(layer, device)):
            moments = self._updates[client].block(layer).to(device, weights.dtype).of_inputs()
            if alignments:
                weights = alignments[client].weights(weights)
                moments = alignments[client].curvature(moments)
            to_client, to_merged = align(weights, merged[index], moments, activation)
            yield to_client.to(weights), to_merged.to(weights)

    def _sent(self, layer: Layer) -> int:
        """Bytes of all clients' weights and curvature of a layer, before a method transforms it."""
        first = self._updates[0]
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
