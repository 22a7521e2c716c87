"""Which samples the curvature is averaged over: seeded, unpadded, each exactly once.

The training loader of a Lightning run shuffles, drops, and under DDP pads. Curvature must not: it
is a mean over the samples themselves, and the same number on one process and on many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeGuard

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
class DealtSamples:
    """This process's share of the samples.

    Attributes:
        batches: the share, as batches of the loader's own form.
        count: samples over all processes; None if the loader cannot tell beforehand.
        population: samples the client holds, before ``max_samples``; None if it cannot be told.
        indices: places of this share within the ``count`` samples; None with ``count``.
    """

    batches: Iterable[Any]
    count: int | None
    population: int | None
    indices: range | None

    def uniforms(self, draws: int, seed: int) -> Callable[[int], Tensor]:
        """Seeded uniform draws that belong to samples, not to batches or processes.

        Args:
            draws: draws for each sample.
            seed: of the draws.

        Returns:
            A function from a batch's number of samples to its draws, of shape ``(n, draws)``.
        """
        generator = np.random.default_rng(seed)
        if self.indices is None or self.count is None:
            return lambda n: torch.from_numpy(generator.random((n, draws)))
        # One row a sample in the common order, so every split over processes sees the same rows.
        rows = torch.from_numpy(generator.random((self.count, draws)))[
            self.indices.start :: self.indices.step
        ]
        remaining = iter(rows)
        return lambda n: torch.stack([next(remaining) for _ in range(n)])


def deal_samples(
    dataloader: Iterable[Any],
    *,
    max_samples: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    shard: Shard | None = None,
) -> DealtSamples:
    """Deals the samples behind a loader to processes, without shuffling, dropping or padding.

    A `DataLoader` over a map-style data set is read anew by index. Any other iterable of batches is
    read as it comes, on one process only.

    Args:
        dataloader: the client's samples.
        max_samples: take a seeded random subset of this size (of an iterable: its first samples,
            to the batch).
        batch_size: samples a batch; the loader's own if None.
        seed: of the subset.
        shard: this process's place; a single process if None.

    Returns:
        This process's share.

    Raises:
        ValueError: if there are no samples, or it cannot be told which the client trains on.
    """
    shard = shard or Shard()
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples must be at least 1, got {max_samples}")
    if not _is_map_style(dataloader):
        if shard.world_size > 1:
            raise ValueError(
                "an iterable without indices cannot be dealt to several processes: pass "
                "`dataloader=` a DataLoader over a map-style data set"
            )
        return DealtSamples(dataloader, None, None, None)
    batch_sampler = _batch_sampler(dataloader)
    population = _trained_indices(dataloader, batch_sampler.sampler)
    chosen = population
    if max_samples is not None and max_samples < len(population):
        picks = np.random.default_rng(seed).choice(len(population), max_samples, replace=False)
        chosen = [population[pick] for pick in sorted(picks.tolist())]
    mine = range(shard.rank, len(chosen), shard.world_size)
    batches = DataLoader(
        dataloader.dataset,
        batch_size=batch_size or batch_sampler.batch_size,
        sampler=[chosen[place] for place in mine],
        collate_fn=dataloader.collate_fn,
        num_workers=dataloader.num_workers,
        worker_init_fn=dataloader.worker_init_fn,
        multiprocessing_context=dataloader.multiprocessing_context,
        timeout=dataloader.timeout,
        generator=torch.Generator().manual_seed(seed),
    )
    return DealtSamples(batches, len(chosen), len(population), mine)


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
