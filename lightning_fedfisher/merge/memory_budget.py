"""How much of the clients' weights and curvature is held in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import reduce

import torch

from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.curvature.registry import KINDS
from lightning_fedfisher.layers import Layer
from lightning_fedfisher.update.client_update import ClientUpdate
from lightning_fedfisher.update.header import UpdateHeader

DEFAULT_MEMORY_BUDGET = 2**30
"""Bytes of clients' weights and curvature that a merge holds at a time, unless told otherwise."""

# Bytes of a number in float32; float64 updates are the exception.
_FLOAT_BYTES = 4
# A decomposition holds about this many float64 matrices of a factor's size at once.
_DECOMPOSITION_BYTES = 6 * 8
# A solver's step holds about this many float64 matrices of a layer's shape at once.
_STEP_BYTES = 9 * 8
# Copies of the model in memory: merged, averaged, and in the solvers.
_MODEL_COPIES = 3


class MemoryBudget:
    """Decides which layers may be in work at the same time, and what is offloaded to disk.

    Attributes:
        limit: Bytes to hold at a time.
        sizes: Bytes that each layer's problem takes while it is in work: an estimate until the
            layer was read.
        reserved: Bytes held for as long as the merge lasts, beside the layers in work.

    Example:
        >>> budget = MemoryBudget(limit=100, sizes=[60, 60])
        >>> budget.fits(1, beside=[]), budget.fits(1, beside=[0])
        (True, False)
        >>> budget.must_offload(120)
        True
    """

    def __init__(self, limit: int, sizes: Sequence[int]) -> None:
        """Starts with nothing in memory.

        Args:
            limit: Bytes to hold at a time.
            sizes: Bytes that each layer's problem takes, estimated.

        Raises:
            ValueError: If the limit is negative.
        """
        if limit < 0:
            raise ValueError(f"memory_budget must be at least 0 bytes, got {limit}")
        self.limit, self.sizes, self.reserved = limit, list(sizes), 0

    def fits(self, index: int, beside: Iterable[int]) -> bool:
        """Whether there is room for a layer beside others.

        Args:
            index: Index of the layer.
            beside: Indices of the layers in work.

        Returns:
            True as well if no layer is in work: a layer that exceeds the budget alone is worked on
            from disk.
        """
        others = sum(self.sizes[other] for other in beside)
        return others == 0 or self.reserved + others + self.sizes[index] <= self.limit

    def must_offload(self, nbytes: int) -> bool:
        """Whether something of this size exceeds the budget by itself.

        Args:
            nbytes: Its size in bytes.
        """
        return self.reserved + nbytes > self.limit


def working_dtype(update: ClientUpdate, layer: Layer) -> torch.dtype:
    """The precision in which a layer is merged: its own, and at least float32.

    Args:
        update: Any client's update.
        layer: One of its layers.
    """
    dtypes = (update.specs[name][1] for name in layer.parameter_names)
    return reduce(torch.promote_types, dtypes, torch.float32)


def sent_bytes(header: UpdateHeader, clients: int, layer: Layer) -> int:
    """Estimates what all clients' weights and curvature of a layer take in memory.

    Args:
        header: The header of any client's update.
        clients: Number of clients.
        layer: One of their layers.

    Returns:
        Bytes, as sent: a method may make less of it.
    """
    kind = KINDS[header.kinds[layer.name]]
    return clients * (_weight_bytes(layer) + copies(kind) * _curvature_bytes(header, layer))


def copies(kind: type[Curvature]) -> int:
    """How often a layer in work holds its curvature: a solver may write it in another basis.

    Args:
        kind: The kind of the curvature.
    """
    return 2 if kind.restricts else 1


def factor_sides(header: UpdateHeader, layer: Layer) -> list[int]:
    """Lists the sizes of the matrices that a layer's curvature is decomposed by.

    Args:
        header: The header of any client's update.
        layer: One of its layers.

    Returns:
        The number of rows of each factor.
    """
    kind = KINDS[header.kinds[layer.name]]
    shapes = kind.tensor_shapes(layer.shape, layer.kernel)
    return [shapes[part][0] for part, role in kind.tensor_roles.items() if role == "factor"]


def peak_bytes(header: UpdateHeader, clients: int, budget: MemoryBudget) -> int:
    """Estimates how much memory a merge takes in one process, beside Python's own.

    Args:
        header: The header of any client's update.
        clients: Number of clients.
        budget: The budget of the merge.

    Returns:
        Bytes.
    """
    sides = [side for layer in header.layers for side in factor_sides(header, layer)]
    model = sum(map(_weight_bytes, header.layers))
    held = [min(sum(budget.sizes), budget.limit)]
    for layer, size in zip(header.layers, budget.sizes, strict=True):
        if budget.must_offload(size):  # its curvature, one client's and what is made of it
            held.append(clients * _weight_bytes(layer) + 2 * _curvature_bytes(header, layer))
    decomposed = _DECOMPOSITION_BYTES * max(sides, default=1) ** 2
    step = _STEP_BYTES * max(math.prod(layer.shape) for layer in header.layers)
    return _MODEL_COPIES * model + max(held) + max(decomposed, step)


def _weight_bytes(layer: Layer) -> int:
    """Bytes of a layer's weights."""
    return _FLOAT_BYTES * math.prod(layer.shape)


def _curvature_bytes(header: UpdateHeader, layer: Layer) -> int:
    """Bytes of one client's curvature of a layer."""
    shapes = KINDS[header.kinds[layer.name]].tensor_shapes(layer.shape, layer.kernel)
    return _FLOAT_BYTES * sum(map(math.prod, shapes.values()))
