"""What a server reads of the updates: the quadratic of one layer at a time, in bounded memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce

import torch
from torch import Tensor, distributed

from lightning_fedfisher._utils.progress import progress_bar
from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.curvature.input_map import InputMap
from lightning_fedfisher.curvature.registry import KINDS
from lightning_fedfisher.distributed.assignment import deal, oversized_layers
from lightning_fedfisher.distributed.exchange import prepared_together
from lightning_fedfisher.errors import MergeError
from lightning_fedfisher.layers import Activation, Layer
from lightning_fedfisher.merge.alignment import Alignment, align
from lightning_fedfisher.merge.disk_cache import OnDiskCurvatures, OnDiskTensors
from lightning_fedfisher.merge.influence_cap import MEASURES, hold, measure
from lightning_fedfisher.merge.methods import MergeMethod
from lightning_fedfisher.merge.objective import Quadratic, average
from lightning_fedfisher.update.client_update import ClientUpdate


class LayerProblems:
    """The merge problems of a federation, each read from the updates when asked for.

    Attributes:
        weighed: what the clients weigh in the layers read so far (`influence.measure`).
    """

    def __init__(
        self, updates: Sequence[ClientUpdate], method: MergeMethod, memory_budget: int
    ) -> None:
        """Reads the precision of the weights, and nothing else yet.

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
        self._index = {layer.name: index for index, layer in enumerate(self._layers)}
        self._shares = [float(update.num_samples) ** method.share_power for update in updates]
        # A layer is worked with in its own precision, or in float32 if that is less.
        forms = updates[0].specs
        self._dtypes = {
            layer.name: reduce(
                torch.promote_types, (forms[n][1] for n in layer.parameter_names), torch.float32
            )
            for layer in self._layers
        }
        self._sizes = list(map(self._sent, self._layers))
        self._averages: dict[str, Tensor] = {}
        self.forget()

    def forget(self) -> None:
        """Lets go of what was prepared, and of what was found out from merged layers."""
        self._related: dict[tuple[int, Activation], Sequence[Mapping[str, Tensor]]] = {}
        self._related_size = 0  # in memory
        self._prepared: dict[int, OnDiskCurvatures] = {}
        self.weighed = torch.zeros(
            len(self._layers), len(self._updates), len(MEASURES), dtype=torch.float64
        )

    @property
    def shares(self) -> list[float]:
        """What each client counts by its samples alone; they sum to one."""
        return [share / sum(self._shares) for share in self._shares]

    @property
    def peak_bytes(self) -> int:
        """About how much memory a merge takes in one process."""
        kinds, layers = self._updates[0].header.kinds, self._layers
        sides = [1]
        for layer in layers:
            kind = KINDS[kinds[layer.name]]
            shapes = kind.tensor_shapes(layer.shape)
            sides += [
                max(shapes[part]) for part, form in kind.tensor_roles.items() if form == "factor"
            ]
        model = _WIDTH * sum(math.prod(layer.shape) for layer in layers)
        # Merged, averaged and begun; curvature held at a time; eigenvectors of the longest side.
        return 3 * model + min(sum(self._sizes), self._budget) + 6 * 8 * max(sides) ** 2

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

    def waits_for(self, index: int) -> int | None:
        """The layer that has to be merged before.

        Args:
            index: of the layer.

        Returns:
            Its index; None if there is none, as with methods that do not align.
        """
        edge = self._source(index)
        return None if edge is None else edge[0]

    def needs(self, index: int) -> list[int]:
        """A layer and all that have to be merged before it, by index."""
        before = self.waits_for(index)
        return [index] if before is None else [index, *self.needs(before)]

    def read(self, index: int, device: torch.device, merged: Sequence[Tensor]) -> Quadratic:
        """Reads the quadratic of one layer.

        Args:
            index: of the layer.
            device: where to work.
            merged: the merged matrices, of which those it waits for are solved.

        Returns:
            The quadratic, with no client beyond the method's `max_influence`; its curvature, if
            there is any, is on disk where the layer exceeds the budget by itself.

        Raises:
            MergeError: naming the clients whose weights or curvature overflow.
        """
        weights = self._weights(self._layers[index], device)
        blocks: Iterable[Curvature] | None = self._prepared.pop(index, None)
        if blocks is None:
            blocks = self._prepare(index, device)
        if self.waits_for(index) is not None:
            alignments = partial(self._alignments, index, device, merged)
            weights = [a.weights(w) for a, w in zip(alignments(), weights, strict=True)]
            pairs = zip(alignments(), blocks, strict=True)
            blocks = (alignment.curvature(block) for alignment, block in pairs)
        problem = Quadratic(self._shares, weights, self._keep(index, blocks, device))
        self.weighed[index] = measure(problem)
        if too_large := [
            f"{update.source} is too large for float32 in layer {self._layers[index].name}"
            for update, found in zip(self._updates, self.weighed[index], strict=True)
            if found.isinf().any()
        ]:
            raise MergeError(too_large)
        return hold(problem, self.weighed[index], self._method.max_influence)

    def prepare_all(self, left: Sequence[int], rank: int, ranks: int, device: torch.device) -> None:
        """Has all ranks do beforehand what one would do while the others wait for it.

        Args:
            left: layers that are not merged yet, by index.
            rank: this one.
            ranks: how many there are; each must call it.
            device: where this rank works.
        """
        shapes = [layer.shape for layer in self._layers]
        shared = oversized_layers(shapes, ranks)
        for index in left:
            if index in shared:
                self.prepare_together(index, device, shared[index])
        for index in deal(shapes, ranks)[rank]:
            if index in left and index not in shared and self.waits_for(index) is not None:
                self.prepare(index, device)

    def prepare(self, index: int, device: torch.device) -> None:
        """Does what `read` does first, and keeps it on disk, as the layer may have to wait.

        Args:
            index: of the layer.
            device: where to work.
        """
        self._prepared[index] = self._on_disk(index, self._prepare(index, device), device)

    def prepare_together(self, index: int, device: torch.device, owner: int) -> None:
        """Does what `prepare` does, with the help of all ranks, each of which must call it.

        Args:
            index: of the layer.
            device: where this rank works.
            owner: the rank that will read the layer.
        """
        make = partial(self._transformed, index, device)
        blocks = prepared_together(len(self._updates), owner, make, device)
        spilled = self._on_disk(index, blocks, device)
        if distributed.get_rank() == owner:
            self._prepared[index] = spilled

    def _on_disk(
        self, index: int, blocks: Iterable[Curvature], device: torch.device
    ) -> OnDiskCurvatures:
        name, clients = self._layers[index].name, len(self._updates)
        return OnDiskCurvatures(progress_bar(blocks, f"curvature of {name}", clients), device)

    def _prepare(self, index: int, device: torch.device) -> Iterator[Curvature]:
        return (self._transformed(index, device, client) for client in range(len(self._updates)))

    def _transformed(self, index: int, device: torch.device, client: int) -> Curvature:
        """What the method makes of a client's curvature of a layer."""
        layer, header = self._layers[index], self._updates[client].header
        block = self._updates[client].block(layer).to(device, self._dtypes[layer.name])
        head = layer.name == header.output_layer and self.waits_for(index) is not None
        return self._method.transform(block, head)

    def _keep(
        self, index: int, curvatures: Iterable[Curvature], device: torch.device
    ) -> Sequence[Curvature]:
        """Takes all clients' curvature of a layer, to disk if it exceeds the budget by itself."""
        layer, clients = self._layers[index], len(self._updates)
        every = iter(progress_bar(curvatures, f"curvature of {layer.name}", clients))
        first = next(every)
        tensors = list(first.tensors().values())
        weights = math.prod(first.shape) * self._dtypes[layer.name].itemsize
        self._sizes[index] = clients * (weights + sum(t.nbytes for t in tensors))
        every = itertools.chain([first], every)
        exceeds = self._related_size + self._sizes[index] > self._budget
        return OnDiskCurvatures(every, device) if tensors and exceeds else [*every]

    def fits(self, index: int, held: Iterable[int]) -> bool:
        """Whether there is room for a layer beside others.

        Args:
            index: of the layer.
            held: indices of layers in memory.

        Returns:
            True as well if there are no others: a layer alone may exceed the budget, on disk.
        """
        others = sum(self._sizes[other] for other in held)
        return others == 0 or self._related_size + others + self._sizes[index] <= self._budget

    def _source(self, index: int) -> tuple[int, Activation] | None:
        """The layer whose outputs another reads, if both sides tell how to align them."""
        header, layer = self._updates[0].header, self._layers[index]
        source = header.fed_by.get(layer.name)
        if source is None or not self._method.aligns:
            return None
        if any(KINDS[header.kinds[n]].inputs_on != "columns" for n in (layer.name, source.layer)):
            return None
        return self._index[source.layer], source.activation

    def _alignments(
        self, index: int, device: torch.device, merged: Sequence[Tensor]
    ) -> Iterator[Alignment]:
        """How an aligned layer's inputs relate to the merged model's, by client."""
        edge, inputs = self._source(index), self._layers[index].inputs
        assert edge is not None
        if edge not in self._related:
            self._related[edge] = self._keep_related(edge, device, merged)
        for maps in self._related[edge]:
            to_client, to_merged = (
                InputMap(maps["client"], inputs),
                InputMap(maps["merged"], inputs),
            )
            yield Alignment(to_client, to_merged)

    def _keep_related(
        self, edge: tuple[int, Activation], device: torch.device, merged: Sequence[Tensor]
    ) -> Sequence[Mapping[str, Tensor]]:
        """Finds out how the outputs of a merged layer relate, once for all that read them."""
        layer, clients = self._layers[edge[0]], len(self._updates)
        found = progress_bar(
            self._relate(*edge, device, merged), f"outputs of {layer.name}", clients
        )
        size = 2 * clients * layer.shape[0] ** 2 * self._dtypes[layer.name].itemsize
        if self._related_size + size > self._budget:
            return OnDiskTensors(found, device)
        self._related_size += size
        return list(found)

    def _relate(
        self, index: int, activation: Activation, device: torch.device, merged: Sequence[Tensor]
    ) -> Iterator[Mapping[str, Tensor]]:
        """How the outputs of a merged layer relate to each client's."""
        layer = self._layers[index]
        aligned = self.waits_for(index) is not None
        alignments = self._alignments(index, device, merged) if aligned else itertools.repeat(None)
        for update, alignment in zip(self._updates, alignments, strict=False):
            weights = update.weights(layer).to(device, self._dtypes[layer.name])
            moments = update.block(layer).to(device, weights.dtype).of_inputs()
            if alignment is not None:
                weights, moments = alignment.weights(weights), alignment.curvature(moments)
            to_client, to_merged = align(weights, merged[index], moments, activation)
            yield {"client": to_client.to(weights), "merged": to_merged.to(weights)}

    def _sent(self, layer: Layer) -> int:
        """Bytes of all clients' weights and curvature of a layer, before a method transforms it."""
        first = self._updates[0]
        kind = KINDS[first.header.kinds[layer.name]]
        parts = (layer.shape, *kind.tensor_shapes(layer.shape).values())
        return len(self._updates) * _WIDTH * sum(map(math.prod, parts))

    def _weights(self, layer: Layer, device: torch.device) -> list[Tensor]:
        """One layer's matrix from every update."""
        dtype = self._dtypes[layer.name]
        return [update.weights(layer).to(device, dtype) for update in self._updates]


# Bytes of a number; float64 updates are the exception.
_WIDTH = 4
