"""Which rank works on which layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

IDLE = -1
"""In place of a layer's index: a batch in which a rank has nothing to do."""


def assign_layers(shapes: Sequence[tuple[int, int]], ranks: int) -> list[list[int]]:
    """Assigns layers to ranks by what a solver step costs, the costliest to the least busy first.

    (Longest processing time first; Graham, 1969.)

    Args:
        shapes: Shapes of the layers' matrices.
        ranks: Number of processes.

    Returns:
        For each rank the indices of its layers, the cheapest first.

    Example:
        >>> assign_layers([(2, 2), (9, 9), (3, 3)], ranks=2)
        [[1], [0, 2]]
    """
    costs = _costs(shapes)
    assigned: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = loads.index(min(loads))
        assigned[rank].append(index)
        loads[rank] += costs[index]
    return [indices[::-1] for indices in assigned]


def oversized_layers(shapes: Sequence[tuple[int, int]], ranks: int) -> dict[int, int]:
    """Finds the layers that cost more than an equal part of all: no rank has two of them.

    Args:
        shapes: Shapes of the layers' matrices.
        ranks: Number of processes.

    Returns:
        By the index of such a layer, the rank it is assigned to.

    Example:
        >>> oversized_layers([(2, 2), (9, 9), (3, 3)], ranks=2)
        {1: 0}
    """
    costs = _costs(shapes)
    return {
        index: rank
        for rank, indices in enumerate(assign_layers(shapes, ranks))
        for index in indices
        if costs[index] * ranks > sum(costs)
    }


class LayerBatches:
    """The indices of one rank's layers, as the batches of an epoch.

    Ranks meet at every batch, so all of them take the same number; a rank with fewer layers has
    idle ones. They come first, then the cheaper layers, because the other ranks wait for rank 0 at
    the start of a batch. (A `DataLoader` would sample the indices, or repeat some.)

    Example:
        >>> list(LayerBatches([4, 2], turns=3))
        [-1, 4, 2]
    """

    def __init__(self, owned: Sequence[int], turns: int) -> None:
        """Fills up with idle batches.

        Args:
            owned: Indices of the rank's layers, the cheapest first.
            turns: Number of batches that every rank takes.
        """
        self._turns = [IDLE] * (turns - len(owned)) + list(owned)

    def __iter__(self) -> Iterator[int]:
        return iter(self._turns)

    def __len__(self) -> int:
        return len(self._turns)


def _costs(shapes: Sequence[tuple[int, int]]) -> list[int]:
    return [rows * columns * (rows + columns) for rows, columns in shapes]
