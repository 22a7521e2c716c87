"""Which samples the curvature is averaged over: seeded, unpadded, each exactly once.

The training loader of a Lightning run shuffles, drops, and under DDP pads. Curvature must not: it
is a mean over the samples themselves, and the same number on one process and on many.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

MaxSamples = int | Literal["auto"] | None
"""How many samples at most: so many, every twelfth but no fewer than 300, or all."""

# Samples looked at beforehand.
PREVIEW = 4
# From here on the merged accuracy gains less than half a point from all samples (see the recipes'
# curvature study), and a twelfth of them costs less than a quarter of an epoch.
_SHARE, _FEWEST = 12, 300


def check_max_samples(max_samples: object) -> None:
    """Refuses what is no `MaxSamples`.

    Args:
        max_samples: as asked for.

    Raises:
        ValueError: if it is neither a number from 1, ``"auto"`` nor None.
    """
    counted = type(max_samples) is int and max_samples >= 1
    if not counted and max_samples not in (None, "auto"):
        raise ValueError(f"max_samples must be at least 1, None or 'auto', got {max_samples!r}")


def most_samples(max_samples: MaxSamples, population: int) -> int:
    """How many of a client's samples its curvature is averaged over.

    Args:
        max_samples: as asked for.
        population: samples the client holds.

    Returns:
        At most the population.
    """
    if max_samples == "auto":
        max_samples = max(_FEWEST, population // _SHARE)
    return population if max_samples is None else min(max_samples, population)


@dataclass(frozen=True)
class Shard:
    """This process's place among those that extract together.

    Attributes:
        rank: index of this process.
        world_size: number of processes.
        total: adds a tensor up over all processes.
    """

    rank: int = 0
    world_size: int = 1
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def first(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, on every process."""
        if self.world_size == 1:
            return tensor
        # A sum of one term and zeros is exact.
        return self.total(tensor.clone() if self.rank == 0 else torch.zeros_like(tensor))


@dataclass(frozen=True)
class SamplePartition:
    """This process's share of the samples.

    Attributes:
        batches: the share, as batches of the loader's own form.
        preview: gives a few samples as one batch, the same on every process.
        count: samples over all processes; None if the loader cannot tell beforehand.
        population: samples the client holds, before ``max_samples``; None if it cannot be told.
        indices: places of this share within the ``count`` samples; None with ``count``.
        again: whether `batches` can be run through more than once.
        batch_size: samples a batch; None if that is not in our hands.
        rebatch: the same samples in batches of another size.
    """

    batches: Iterable[Any]
    preview: Callable[[], Any]
    count: int | None = None
    population: int | None = None
    indices: range | None = None
    again: bool = True
    batch_size: int | None = None
    rebatch: Callable[[int], SamplePartition] | None = None

    def uniforms(self, seed: int) -> Callable[[int, int], Tensor]:
        """Seeded uniform draws that belong to samples, not to batches or processes.

        Args:
            seed: of the draws.

        Returns:
            A function from a batch's number of samples and a number ``n`` to its draws, of shape
            ``(samples, n)``, to be called for one batch after the other.
        """
        generators: Iterator[np.random.Generator]
        if self.indices is None:
            generators = itertools.repeat(np.random.default_rng(seed))
        else:
            # One generator a sample, so that every split over processes and batches sees the same.
            generators = (np.random.default_rng((seed, place)) for place in self.indices)

        def draw(samples: int, n: int) -> Tensor:
            return torch.from_numpy(np.stack([next(generators).random(n) for _ in range(samples)]))

        return draw


def partition_samples(
    dataloader: Iterable[Any],
    *,
    max_samples: MaxSamples = None,
    batch_size: int | None = None,
    seed: int = 0,
    shard: Shard | None = None,
) -> SamplePartition:
    """Deals the samples behind a loader to processes, without shuffling, dropping or padding.

    A `DataLoader` over a map-style data set is read anew by index. Any other iterable of batches is
    read as it comes, on one process only.

    Args:
        dataloader: the client's samples.
        max_samples: take a seeded random subset of this size (see `most_samples`). An iterable
            has no subset; who reads it stops after so many.
        batch_size: samples a batch; the loader's own if None.
        seed: of the subset.
        shard: this process's place; a single process if None.

    Returns:
        This process's share.

    Raises:
        ValueError: if there are no samples, or it cannot be told which the client trains on.
    """
    shard = shard or Shard()
    check_max_samples(max_samples)
    if not _is_map_style(dataloader):
        if shard.world_size > 1:
            raise ValueError(
                "an iterable without indices cannot be dealt to several processes: pass "
                "`dataloader=` a DataLoader over a map-style data set"
            )
        stream = _Stream(dataloader)
        return SamplePartition(stream, stream.first, again=stream.again)
    batch_sampler = _batch_sampler(dataloader)
    population = _trained_indices(dataloader, batch_sampler.sampler)
    chosen = population
    most = most_samples(max_samples, len(population))
    if most < len(population):
        picks = np.random.default_rng(seed).choice(len(population), most, replace=False)
        chosen = [population[pick] for pick in sorted(picks.tolist())]
    mine = range(shard.rank, len(chosen), shard.world_size)

    def in_batches_of(size: int | None) -> SamplePartition:
        batches = DataLoader(
            dataloader.dataset,
            batch_size=size,
            sampler=[chosen[place] for place in mine],
            collate_fn=dataloader.collate_fn,
            num_workers=dataloader.num_workers,
            worker_init_fn=dataloader.worker_init_fn,
            multiprocessing_context=dataloader.multiprocessing_context,
            timeout=dataloader.timeout,
            generator=torch.Generator().manual_seed(seed),
        )
        looked_at = min(PREVIEW, max(2, size or 1))
        few = DataLoader(
            dataloader.dataset,
            batch_size=looked_at,
            # A lone sample twice, so that one can be told from another.
            sampler=(chosen * 2)[:looked_at],
            collate_fn=dataloader.collate_fn,
            generator=torch.Generator().manual_seed(seed),
        )
        return SamplePartition(
            batches,
            lambda: next(iter(few)),
            len(chosen),
            len(population),
            mine,
            batch_size=size,
            rebatch=in_batches_of,
        )

    return in_batches_of(batch_size or batch_sampler.batch_size)


class _Stream:
    """An iterable of batches whose first can be looked at beforehand."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches
        # An iterator is its own iterator, and over when it is over.
        self.again = not isinstance(batches, Iterator)
        self._seen: list[Any] = []

    def first(self) -> Any:
        if not self._seen or self.again:
            self._seen = list(itertools.islice(self._batches, 1))
        if not self._seen:
            raise ValueError("the client holds no samples: there is no curvature to extract")
        return self._seen[0]

    def __iter__(self) -> Iterator[Any]:
        if self.again:
            yield from self._batches
            return
        self._seen = self._seen or list(itertools.islice(self._batches, 1))
        # Whoever gives up at the first batch may start again.
        yield from self._seen
        self._seen.clear()
        yield from self._batches


def _is_map_style(dataloader: Iterable[Any]) -> TypeGuard[DataLoader[Any]]:
    return isinstance(dataloader, DataLoader) and not isinstance(
        dataloader.dataset, IterableDataset
    )


def _batch_sampler(dataloader: DataLoader[Any]) -> BatchSampler:
    if type(dataloader.batch_sampler) is not BatchSampler:
        raise ValueError(
            "a custom batch sampler, or batch_size=None, hides which samples the client trains on: "
            "pass `dataloader=` a plain DataLoader over them"
        )
    return dataloader.batch_sampler


def _trained_indices(dataloader: DataLoader[Any], sampler: Iterable[Any]) -> list[int]:
    """Indices of the samples the loader trains on, each once, whatever its order and padding."""
    size = len(dataloader.dataset)  # type: ignore[arg-type]
    whole = type(sampler) in (SequentialSampler, DistributedSampler) or (
        type(sampler) is RandomSampler and not sampler.replacement
    )
    if whole:
        indices = list(range(size))
    elif type(sampler) is SubsetRandomSampler:
        indices = sorted({int(index) for index in sampler.indices})
    elif isinstance(sampler, list | tuple | range):
        indices = sorted({int(index) for index in sampler})
    else:
        raise ValueError(
            f"{type(sampler).__name__} hides which samples the client trains on, or repeats some: "
            "pass `dataloader=` a plain DataLoader over them"
        )
    if not indices:
        raise ValueError("the client holds no samples: there is no curvature to extract")
    return indices
