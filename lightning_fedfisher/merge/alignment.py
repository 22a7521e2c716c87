"""What the units of a layer have become in the merged model, from second moments alone.

Once a layer is merged, its outputs are no client's any more, and the next layer would read them
with weights made for others. On a client's data the second moments of both are known: with inputs
of second moment ``A``, weights ``W`` of the client and ``V`` of the merged model, they are
``W A V'`` across and ``V A V'`` among the merged outputs. Behind a rectifier they are those of the
arc-cosine kernel (Cho & Saul, 2009), exact where the outputs are normal with mean zero; pooling
changes nothing. Two ridge regressions follow: from merged units to the client's, for its weights,
and back, for its curvature.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fedfisher._utils.text import terminal_text
from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.curvature.input_map import InputMap
from lightning_fedfisher.curvature.registry import KINDS
from lightning_fedfisher.distributed.progress import progress_bar
from lightning_fedfisher.layers import Activation
from lightning_fedfisher.merge.disk_cache import OnDiskTensors
from lightning_fedfisher.merge.memory_budget import MemoryBudget, working_dtype
from lightning_fedfisher.update.client_update import ClientUpdate

# A share of all second moments. What is known of a direction with less is shrunk to the identity.
_RIDGE = 0.1
# A share of the second moments of what is predicted. What is known by less says nothing of it: a
# client whose units are next to nothing would have its next layer multiplied without bound.
_FAINT = 1e-6


@dataclass(frozen=True)
class Alignment:
    """How the inputs of one client's layer relate to those it has in the merged model.

    Attributes:
        to_client: Predicts the client's inputs from the merged model's.
        to_merged: Predicts the merged model's inputs from the client's.
    """

    to_client: InputMap
    to_merged: InputMap

    def weights(self, matrix: Tensor) -> Tensor:
        """Changes the client's weights so that they read the merged model's inputs.

        Args:
            matrix: The layer's weight matrix, of shape ``(out, in)``.

        Returns:
            A matrix of the same shape.
        """
        return self.to_client.on_columns(matrix)

    def curvature(self, curvature: Curvature) -> Curvature:
        """Changes the client's curvature to the second moments of the merged model's inputs.

        Args:
            curvature: Of a kind that holds its inputs' second moments on its columns.

        Returns:
            A curvature of the same kind.
        """
        return curvature.with_inputs(self.to_merged)


def align(
    client: Tensor, merged: Tensor, moments: Curvature, activation: Activation
) -> tuple[Tensor, Tensor]:
    """Relates the units of a client's layer to those of the merged layer.

    Args:
        client: The client's weights ``W``, of shape ``(units, in)``, for the merged model's inputs.
        merged: The merged weights ``V``, of the same shape.
        moments: ``I x A``, the second moments of the merged model's inputs on the client's data.
        activation: What the units' outputs go through.

    Returns:
        The maps between units behind the activation, each of shape ``(units, units)`` in float64:
        from merged units to the client's, and from the client's to merged ones.

    Example:
        >>> from lightning_fedfisher.curvature import Identity
        >>> weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> to_client, _ = align(weights, weights, Identity((2, 2)), "identity")
        >>> torch.allclose(to_client, torch.eye(2).double())
        True
    """
    seen, own = moments.apply(merged).double(), moments.apply(client).double()
    client, merged = client.double(), merged.double()
    across, among, alone = client @ seen.mT, merged @ seen.mT, client @ own.mT
    if activation == "relu":
        ours, theirs = among.diagonal(), alone.diagonal()
        across = _rectified(across, theirs, ours)
        among = _rectified(among, ours, ours)
        alone = _rectified(alone, theirs, theirs)
    return _regression(across, among, alone), _regression(across.mT, alone, among)


def _rectified(moments: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Second moments behind a rectifier, of normal variables with mean zero.

    Args:
        moments: Second moments before it, of shape ``(m, n)``.
        rows: Second moment of each row's variable, of shape ``(m,)``.
        columns: Second moment of each column's variable, of shape ``(n,)``.

    Returns:
        The arc-cosine kernel of degree one, of shape ``(m, n)``.
    """
    scale = torch.outer(rows.clamp_min(0).sqrt(), columns.clamp_min(0).sqrt())
    cosine = torch.where(scale > 0, moments / scale, 0.0).clamp(-1, 1)
    angle = cosine.acos()
    return scale * (angle.sin() + (math.pi - angle) * cosine) / (2 * math.pi)


def _regression(across: Tensor, among: Tensor, predicted: Tensor) -> Tensor:
    """Ridge regression of one side on the other, shrunk to the identity.

    Args:
        across: Second moments between what is predicted and what is known.
        among: Second moments of what is known.
        predicted: Second moments of what is predicted.

    Returns:
        ``(across + r I) (among + r I)^-1`` with `_RIDGE` times the trace as ``r``.
    """
    known = torch.maximum(among.trace(), _FAINT * predicted.trace())
    floor = _RIDGE * known * torch.eye(len(among)).to(among)
    if not floor.any():  # nothing is known
        return torch.eye(len(among)).to(among)
    regression: Tensor = torch.linalg.solve(among + floor, across + floor, left=False)
    return regression


class LayerAlignments:
    """How the inputs of each layer relate, in all clients, to those it has in the merged model.

    A layer is aligned if it reads the outputs of one other layer and both have curvature that
    holds their inputs' second moments. It has to wait until that other layer is merged.
    """

    def __init__(
        self, updates: Sequence[ClientUpdate], budget: MemoryBudget, enabled: bool = True
    ) -> None:
        """Reads headers alone.

        Args:
            updates: The updates of all clients, found to belong together.
            budget: What is found out of a layer is held in memory within it, else on disk.
            enabled: Whether any layer is aligned at all.
        """
        self._updates, self._budget, self._layers = updates, budget, updates[0].layers
        self._edges: dict[int, tuple[int, Activation]] = {}
        self._maps: dict[tuple[int, Activation], Sequence[Mapping[str, Tensor]]] = {}
        header = updates[0].header
        indices = {layer.name: index for index, layer in enumerate(self._layers)}
        for reader, source in header.fed_by.items() if enabled else ():
            kinds = (KINDS[header.kinds[name]] for name in (reader, source.layer))
            if all(kind.inputs_on == "columns" for kind in kinds):
                self._edges[indices[reader]] = indices[source.layer], source.activation

    def forget(self) -> None:
        """Lets go of what was found out from merged layers."""
        self._maps.clear()
        self._budget.reserved = 0

    def waits_for(self, index: int) -> int | None:
        """The layer that has to be merged before.

        Args:
            index: Index of the layer.

        Returns:
            The index of the other layer; None if the layer is not aligned.
        """
        return self._edges[index][0] if index in self._edges else None

    def ancestors(self, index: int) -> list[int]:
        """A layer and all that have to be merged before it.

        Args:
            index: Index of the layer.

        Returns:
            Indices, from the layer backwards.
        """
        found = [index]
        while (before := self.waits_for(found[-1])) is not None:
            found.append(before)
        return found

    def of_layer(
        self, index: int, device: torch.device, merged: Sequence[Tensor]
    ) -> Iterator[Alignment]:
        """How an aligned layer's inputs relate to the merged model's, for one client at a time.

        Args:
            index: Index of the layer.
            device: Where to work.
            merged: The merged matrices of all layers, of which those waited for are solved.
        """
        edge, inputs = self._edges[index], self._layers[index].inputs
        if edge not in self._maps:
            self._maps[edge] = self._hold(edge, device, merged)
        for maps in self._maps[edge]:
            yield Alignment(InputMap(maps["client"], inputs), InputMap(maps["merged"], inputs))

    def _hold(
        self, edge: tuple[int, Activation], device: torch.device, merged: Sequence[Tensor]
    ) -> Sequence[Mapping[str, Tensor]]:
        """Relates the outputs of a merged layer once, for all layers that read them."""
        layer, clients = self._layers[edge[0]], len(self._updates)
        found = progress_bar(
            self._relate(*edge, device, merged),
            f"outputs of {terminal_text(layer.name)}",
            clients,
        )
        width = working_dtype(self._updates[0], layer).itemsize
        nbytes = 2 * clients * layer.shape[0] ** 2 * width
        if self._budget.must_offload(nbytes):
            return OnDiskTensors(found, device)
        self._budget.reserved += nbytes
        return list(found)

    def _relate(
        self, index: int, activation: Activation, device: torch.device, merged: Sequence[Tensor]
    ) -> Iterator[Mapping[str, Tensor]]:
        """How the outputs of a merged layer relate to each client's."""
        layer, aligned = self._layers[index], self.waits_for(index) is not None
        dtype = working_dtype(self._updates[0], layer)
        alignments = self.of_layer(index, device, merged) if aligned else itertools.repeat(None)
        for update, alignment in zip(self._updates, alignments, strict=False):
            with update.opened():
                weights = update.weights(layer).to(device, dtype)
                moments = update.block(layer, device=device, dtype=dtype).of_inputs()
            if alignment is not None:
                weights, moments = alignment.weights(weights), alignment.curvature(moments)
            to_client, to_merged = align(weights, merged[index], moments, activation)
            yield {"client": to_client.to(weights), "merged": to_merged.to(weights)}
