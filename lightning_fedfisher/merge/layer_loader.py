"""Reads the merge problem of one layer at a time from the updates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fedfisher._utils.text import terminal_text
from lightning_fedfisher.curvature.base import Curvature, Identity
from lightning_fedfisher.distributed.progress import progress_bar
from lightning_fedfisher.errors import MergeError
from lightning_fedfisher.layers import Layer
from lightning_fedfisher.likelihoods.registry import LIKELIHOODS
from lightning_fedfisher.merge.alignment import Alignment, LayerAlignments
from lightning_fedfisher.merge.disk_cache import OnDiskCurvatures
from lightning_fedfisher.merge.influence_cap import cap, measure
from lightning_fedfisher.merge.memory_budget import (
    DEFAULT_MEMORY_BUDGET,
    MemoryBudget,
    copies,
    sent_bytes,
    working_dtype,
)
from lightning_fedfisher.merge.methods import MergeMethod
from lightning_fedfisher.merge.objective import LeastSquares, Quadratic, average, dot
from lightning_fedfisher.merge.typical_curvature import TypicalCurvature
from lightning_fedfisher.update.client_update import ClientUpdate

_ROUNDED = 0.05  # of a label's length: what the rounding of a packed fit may change


class LoadedLayer(NamedTuple):
    """The merge problem of one layer, as it was read.

    Attributes:
        problem: The quadratic, with no client beyond the method's `max_influence`.
        influence: What each client weighed before it was capped (`influence_cap.measure`).
        nbytes: Bytes of the clients' weights and curvature, with what a solver makes of it.
    """

    problem: Quadratic
    influence: Tensor
    nbytes: int


class LayerLoader:
    """Makes the merge problem of one layer from the clients' updates.

    Attributes:
        updates: The updates of all clients.
        layers: Their layers.
        method: The merge method.
        client_weights: What each client counts for by its number of samples alone, of any sum.
        budget: How much is held in memory at a time.
        alignments: How the inputs of aligned layers relate.
        keeps_means: Whether the output layer has about the inputs that it has in the clients.
    """

    def __init__(
        self,
        updates: Sequence[ClientUpdate],
        method: MergeMethod,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        keeps_means: bool = False,
    ) -> None:
        """Reads headers alone.

        Args:
            updates: The updates of all clients, found to belong together.
            method: The merge method.
            memory_budget: Bytes of weights and curvature to hold at a time.
            keeps_means: Whether the output layer has about the inputs that it has in the clients,
                or at least their means, though it is not aligned.

        Raises:
            ValueError: If the budget is negative.
        """
        self.updates, self.method, self.layers = updates, method, updates[0].layers
        self.keeps_means = keeps_means
        self.client_weights = [float(u.num_samples) ** method.client_weight_power for u in updates]
        sizes = [sent_bytes(updates[0].header, len(updates), layer) for layer in self.layers]
        self.budget = MemoryBudget(memory_budget, sizes)
        self.alignments = LayerAlignments(updates, self.budget, enabled=method.aligns)
        self._dtypes = [working_dtype(updates[0], layer) for layer in self.layers]

    def forget(self) -> None:
        """Lets go of what was found out from merged layers."""
        self.alignments.forget()

    def average(self, index: int) -> Tensor:
        """Averages the clients' weights of a layer: what it is before its merge.

        Args:
            index: Index of the layer.

        Returns:
            A matrix of the layer's shape on the CPU, in at least float32.
        """
        return average(self.client_weights, self.weights(index, torch.device("cpu")))

    def dtype(self, index: int) -> torch.dtype:
        """The precision in which a layer is merged.

        Args:
            index: Index of the layer.
        """
        return self._dtypes[index]

    def weights(self, index: int, device: torch.device) -> list[Tensor]:
        """Reads the clients' weight matrices of a layer.

        Args:
            index: Index of the layer.
            device: Where to put them.
        """
        return [self._weights(index, update, device) for update in self.updates]

    def _weights(self, index: int, update: ClientUpdate, device: torch.device) -> Tensor:
        with update.opened():
            return update.weights(self.layers[index]).to(device, self._dtypes[index])

    def curvature(self, index: int, client: int, device: torch.device) -> Curvature:
        """Reads what the method makes of one client's curvature of a layer.

        Args:
            index: Index of the layer.
            client: Index of the client.
            device: Where to put it.
        """
        layer, update = self.layers[index], self.updates[client]
        if self.method.ignores_curvature:
            return self.method.transformed(Identity(layer.shape))
        head = layer.name == update.header.output_layer
        aligned = self.alignments.waits_for(index) is not None
        is_output_layer = head and (aligned or self.keeps_means)
        is_linear = layer.is_linear and not (head or aligned)
        dtype = self._dtypes[index]
        if self.method.transform_of(is_output_layer) is None:  # then roots need not be multiplied
            power, damping, of_inputs = self.method.powers(not head, is_linear)
            return update.block(layer, power, device, dtype, damping, of_inputs)
        block = update.block(layer, device=device, dtype=dtype)
        return self.method.transformed(block, is_output_layer, not head, is_linear)

    def curvatures(self, index: int, device: torch.device) -> Iterator[Curvature]:
        """Reads what the method makes of the clients' curvature of a layer, one at a time.

        Args:
            index: Index of the layer.
            device: Where to put it.
        """
        return (self.curvature(index, client, device) for client in range(len(self.updates)))

    def read(
        self,
        index: int,
        device: torch.device,
        merged: Sequence[Tensor] = (),
        prepared: Iterable[Curvature] | None = None,
    ) -> LoadedLayer:
        """Reads the merge problem of a layer.

        Args:
            index: Index of the layer.
            device: Where to work.
            merged: The merged matrices of all layers, of which those that the layer waits for are
                solved; needed by methods that align.
            prepared: The clients' `curvatures`, where they were read before.

        Returns:
            The problem. Its curvature is offloaded to disk if the layer exceeds the memory budget
            by itself.

        Raises:
            MergeError: If weights or curvature overflow float32, naming the clients.
        """
        layer, weights = self.layers[index], list[Tensor]()

        def curvatures() -> Iterator[Curvature]:
            """Curvature of one client after the other; its weights are read along with it."""
            for client, alignment in enumerate(self._alignments(index, device, merged)):
                matrix, curvature = self._read_client(index, client, device, ready)
                weights.append(alignment.weights(matrix) if alignment else matrix)
                yield alignment.curvature(curvature) if alignment else curvature

        ready = None if prepared is None else iter(prepared)
        held, nbytes = self._hold(layer, curvatures(), self._dtypes[index], device)
        problem = Quadratic(self.client_weights, weights, held, self._fit(layer))
        if offenders := self._unlike_their_labels(problem):
            raise MergeError(offenders)
        # Fits of labels are exact with their own curvature alone.
        bounded = self.method.max_influence < math.inf and problem.fit is None
        typical = TypicalCurvature.of(problem.curvatures) if bounded else None
        influence = measure(problem, typical)
        if overflown := [
            f"{update.source} is too large for float32 in layer {layer.name}"
            for update, found in zip(self.updates, influence, strict=True)
            if found.isinf().any()
        ]:
            raise MergeError(overflown)
        capped = cap(problem, influence, self.method.max_influence, typical)
        return LoadedLayer(capped, influence, nbytes)

    def _unlike_their_labels(self, problem: Quadratic) -> list[str]:
        """Names clients whose fits are not those of classes, of which each label is of length 1."""
        softmax = LIKELIHOODS[self.updates[0].header.likelihood].softmax
        if problem.fit is None or not softmax or self.method.ignores_curvature:
            return []
        found = []
        for update, weights, curvature, error, labels in zip(
            *(self.updates, problem.weights, problem.curvatures),
            *(problem.fit.squared_errors, problem.fit.observations),
            strict=True,
        ):
            squares = error + dot(weights, curvature.apply(weights))
            if not abs(squares - labels) <= _ROUNDED * labels:
                found.append(
                    f"{update.source} claims labels of mean squared length {squares / labels:.3g}, "
                    "and that of a class is 1"
                )
        return found

    def _fit(self, layer: Layer) -> LeastSquares | None:
        """What is known of the clients' fits, if their weights are fits."""
        fits = [update.header.fit for update in self.updates]
        known = [fit for fit in fits if fit is not None]
        if len(known) < len(fits):
            return None
        return LeastSquares(
            sum(update.num_samples for update in self.updates),
            tuple(fit.squared_error for fit in known),
            tuple(fit.observations for fit in known),
            len(layer.parameters) > 1,
        )

    def _alignments(
        self, index: int, device: torch.device, merged: Sequence[Tensor]
    ) -> Iterable[Alignment | None]:
        """For each client how its inputs relate to the merged model's; None if not aligned."""
        if self.alignments.waits_for(index) is None:
            return [None] * len(self.updates)
        return self.alignments.of_layer(index, device, merged)

    def _read_client(
        self, index: int, client: int, device: torch.device, prepared: Iterator[Curvature] | None
    ) -> tuple[Tensor, Curvature]:
        """One client's weights and what the method makes of its curvature, in one opening."""
        update = self.updates[client]
        with update.opened():
            weights = self._weights(index, update, device)
            if prepared is not None:
                return weights, next(prepared)
            return weights, self.curvature(index, client, device)

    def offload(
        self, index: int, curvatures: Iterable[Curvature], device: torch.device
    ) -> OnDiskCurvatures:
        """Writes the clients' curvature of a layer to disk, for when its turn comes.

        Args:
            index: Index of the layer.
            curvatures: The curvature of each client.
            device: Where to put it when it is read.
        """
        return OnDiskCurvatures(self._shown(self.layers[index], curvatures), device)

    def _hold(
        self,
        layer: Layer,
        curvatures: Iterable[Curvature],
        dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[Sequence[Curvature], int]:
        """Takes all clients' curvature: in memory, or on disk if it exceeds the budget alone."""
        every = iter(self._shown(layer, curvatures))
        first = next(every)
        tensors = list(first.tensors().values())
        of_weights = math.prod(first.shape) * dtype.itemsize
        of_curvature = copies(type(first)) * sum(t.nbytes for t in tensors)
        nbytes = len(self.updates) * (of_weights + of_curvature)
        every = itertools.chain([first], every)
        if tensors and self.budget.must_offload(nbytes):
            return OnDiskCurvatures(every, device), nbytes
        return [*every], nbytes

    def _shown(self, layer: Layer, curvatures: Iterable[Curvature]) -> Iterable[Curvature]:
        return progress_bar(
            curvatures, f"curvature of {terminal_text(layer.name)}", len(self.updates)
        )
