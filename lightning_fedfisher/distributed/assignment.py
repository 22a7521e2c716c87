"""Which rank works on which layer in which turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

IDLE = -1
"""In place of a layer's index; Lightning would pass over a batch that is None."""


class SweepCounter(Optimizer):
    """Runs the closure it is given: an optimizer, so that Lightning counts sweeps as steps.

    Checkpoints, loggers and progress bars go by that count, and it must be the same on every rank.
    """

    def __init__(self, parameters: nn.ParameterList) -> None:
        """Takes the merged matrices, and never changes them by itself.

        Args:
            parameters: the merged matrices.
        """
        super().__init__(list(parameters), {})

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return None if closure is None else closure()


class Sweep:
    """The layers of one rank. No `DataLoader`: it must neither be sampled nor filled with copies.

    Lightning exchanges a signal at every batch, so all ranks take the same number; a rank with
    fewer layers has idle turns. They come first, then the cheaper layers, because the other
    ranks wait for rank 0's signal at the start of a turn.
    """

    def __init__(self, owned: Sequence[int], turns: int) -> None:
        """Fills up with idle turns.

        Args:
            owned: indices of the rank's layers, the cheapest first.
            turns: how many every rank has.
        """
        self._turns = [IDLE] * (turns - len(owned)) + list(owned)

    def __iter__(self) -> Iterator[int]:
        return iter(self._turns)

    def __len__(self) -> int:
        return len(self._turns)


def deal(shapes: Sequence[tuple[int, int]], ranks: int) -> list[list[int]]:
    """Deals layers to ranks by the cost of a step: the costliest first, each to the least busy.

    Args:
        shapes: of the layers' matrices.
        ranks: how many processes there are.

    Returns:
        The layers of each rank, the cheapest first.
    """
    costs = _costs(shapes)
    hands: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = loads.index(min(loads))
        hands[rank].append(index)
        loads[rank] += costs[index]
    return [hand[::-1] for hand in hands]


def oversized_layers(shapes: Sequence[tuple[int, int]], ranks: int) -> dict[int, int]:
    """The layers that cost more than a rank's share of all: no rank has more than one of them.

    Args:
        shapes: of the layers' matrices.
        ranks: how many processes there are.

    Returns:
        By their indices, the ranks they are dealt to.
    """
    costs, hands = _costs(shapes), deal(shapes, ranks)
    return {
        index: rank
        for rank, hand in enumerate(hands)
        for index in hand
        if costs[index] * ranks > sum(costs)
    }


def _costs(shapes: Sequence[tuple[int, int]]) -> list[int]:
    return [rows * columns * (rows + columns) for rows, columns in shapes]
