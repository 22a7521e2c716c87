"""Which samples the curvature is averaged over: seeded, unpadded, each exactly once.

The training loader of a Lightning run shuffles, drops samples, and under DDP pads. Curvature must
not: it is a mean over the samples themselves, and the same number on one process and on many.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from tqdm import tqdm

from lightning_fedfisher.distributed.processes import Shard
from lightning_fedfisher.extraction.limits import Limit, at_most, check_limit

MaxSamples = Limit
"""Most samples to average over: a number, "auto" (a twelfth, but at least 300), or None (all)."""

PREVIEW = 3
"""Number of samples that are run before the data pass, to trace the model.

Each of them is a backward pass through all of them. Two would be too few: a number of positions is
even more often than it is a multiple of three, and may then be taken for folded samples.
"""

# "auto" takes one in so many samples, and at least so many. From here on the merged accuracy gains
# less than half a point from all samples (see the recipes' curvature study), and a twelfth of them
# costs less than a quarter of an epoch.
_AUTO_FRACTION, _AUTO_FEWEST = 12, 300
# Tracing tells samples apart, which takes two of them.
_FEWEST_TRACED = 2


def check_max_samples(max_samples: object) -> None:
    """Refuses a value that is not a `MaxSamples`.

    Args:
        max_samples: Value that a user gave.

    Raises:
        ValueError: If it is neither a whole number from 1, ``"auto"`` nor None.
    """
    check_limit("max_samples", max_samples)


def most_samples(max_samples: MaxSamples, population: int) -> int:
    """Tells how many of a client's samples its curvature is averaged over.

    Args:
        max_samples: Most samples to use, as the user gave it.
        population: Number of samples the client holds.

    Returns:
        A number of samples, at most the population.

    Example:
        >>> most_samples("auto", 60_000), most_samples("auto", 100), most_samples(None, 7)
        (5000, 100, 7)
    """
    return at_most(max_samples, population, _AUTO_FRACTION, _AUTO_FEWEST)


@dataclass(frozen=True)
class SamplePartition:
    """The samples of this process, in batches.

    Attributes:
        batches: Batches of the loader's own form.
        preview: Function that gives a few samples as one batch, the same on every process.
        count: Number of samples over all processes; None if the loader cannot tell beforehand.
        population: Number of samples the client holds, before ``max_samples`` applies; None if the
            loader cannot tell.
        indices: Places of this process's samples among all ``count`` of them; None with ``count``.
        again: Whether `batches` can be read more than once.
        mixed: The same samples once more, in batches of a random order where they have indices;
            None where a second reading may give others, or none.
        batch_size: Number of samples in a batch; None if the loader decides.
        rebatch: Function that gives the same samples in batches of another size; None if the
            loader decides.
        alone: Function that gives the first sample of the preview as a batch of one; None if the
            loader decides.
    """

    batches: Iterable[Any]
    preview: Callable[[], Any]
    count: int | None = None
    population: int | None = None
    indices: range | None = None
    again: bool = True
    mixed: Iterable[Any] | None = None
    batch_size: int | None = None
    rebatch: Callable[[int], SamplePartition] | None = None
    alone: Callable[[], Any] | None = None

    def uniforms(self, *seed: int) -> Callable[[int, int], Tensor]:
        """Makes random numbers that are the same for a sample whatever its batch or process.

        Args:
            *seed: Seed of all draws; another number makes other draws.

        Returns:
            A function from the number of samples in a batch and a number ``n`` to draws of shape
            ``(samples, n)``. It is to be called once for each batch, in their order.
        """
        generators: Iterator[np.random.Generator]
        if self.indices is None:
            generators = itertools.repeat(np.random.default_rng(seed))
        else:
            # One generator a sample, so that every split over processes and batches sees the same.
            generators = (np.random.default_rng((*seed, place)) for place in self.indices)

        def draw(samples: int, n: int) -> Tensor:
            return torch.from_numpy(np.stack([next(generators).random(n) for _ in range(samples)]))

        return draw

    def run(
        self,
        add: Callable[[Any], int],
        most: MaxSamples,
        bar: tqdm[Any],
        on_progress: Callable[[int, int | None], None] | None,
    ) -> int:
        """Goes through all batches once.

        Args:
            add: Takes a batch, and returns its number of samples.
            most: Where the loader cannot tell beforehand how many there are, a number ends the pass
                at the batch that reaches it.
            bar: Progress bar, shown or not.
            on_progress: Function that is told after each batch how many samples of this process
                are done, and of how many, or None.

        Returns:
            Number of samples of this process.

        Raises:
            ValueError: If batches have more samples than there are.
        """
        own = None if self.indices is None else len(self.indices)
        stop = most if self.count is None and isinstance(most, int) else None
        bar.reset(own)
        done = 0
        for batch in self.batches:
            n = add(batch)
            done += n
            if own is not None and done > own:
                raise ValueError(
                    "the model gives more rows of logits than there are samples: pass forward= to "
                    "return one row for each sample, with positions after the classes"
                )
            bar.update(n)
            if on_progress is not None:
                on_progress(done, own)
            if stop is not None and done >= stop:
                break
        return done


def partition_samples(
    dataloader: Iterable[Any],
    *,
    max_samples: MaxSamples = None,
    batch_size: int | None = None,
    seed: int = 0,
    shard: Shard | None = None,
) -> SamplePartition:
    """Partitions the samples behind a loader over processes, without shuffling or padding.

    A `DataLoader` over a map-style data set is read anew, by index. Any other iterable of batches
    is read as it comes, on one process only.

    Args:
        dataloader: The client's samples.
        max_samples: Number of samples in a seeded random subset that is taken of them (see
            `most_samples`). An iterable without indices has no subset; whoever reads it stops after
            so many.
        batch_size: Number of samples in a batch; None keeps the loader's own.
        seed: Seed of the subset.
        shard: The place of this process among several; None stands for a single process.

    Returns:
        The samples of this process. Every sample belongs to exactly one process.

    Raises:
        ValueError: If there are no samples, or the loader hides which ones the client trains on.

    Example:
        >>> loader = DataLoader(list(range(5)), batch_size=2, shuffle=True)
        >>> [batch.tolist() for batch in partition_samples(loader, shard=Shard(0, 2)).batches]
        [[0, 2], [4]]
    """
    shard = shard or Shard()
    check_max_samples(max_samples)
    if not _is_map_style(dataloader):
        if shard.world_size > 1:
            raise ValueError(
                "an iterable without indices cannot be partitioned over processes: pass "
                "`dataloader=` a DataLoader over a map-style data set"
            )
        stream = _Stream(dataloader)
        mixed = dataloader if isinstance(dataloader, Sequence) else None
        return SamplePartition(stream, stream.first, again=stream.again, mixed=mixed)
    batch_sampler = _batch_sampler(dataloader)
    population = _trained_indices(dataloader, batch_sampler.sampler)
    chosen = population
    most = most_samples(max_samples, len(population))
    if most < len(population):
        picks = np.random.default_rng(seed).choice(len(population), most, replace=False)
        chosen = [population[pick] for pick in sorted(picks.tolist())]
    mine = range(shard.rank, len(chosen), shard.world_size)

    def in_batches_of(size: int | None) -> SamplePartition:
        previewed = min(PREVIEW, max(_FEWEST_TRACED, size or 1))
        # A lone sample twice, so that one can be told from another.
        few = in_one_batch(dataloader, (chosen * 2)[:previewed], seed)
        one = in_one_batch(dataloader, chosen[:1], seed)
        shuffled = np.random.default_rng(seed).permutation(mine).tolist()

        def all_of(places: Sequence[int]) -> DataLoader[Any]:
            indices = [chosen[place] for place in places]
            return _loader_over(dataloader, indices, size, dataloader.num_workers, seed)

        return SamplePartition(
            all_of(mine),
            lambda: next(iter(few)),
            len(chosen),
            len(population),
            mine,
            mixed=all_of(shuffled),
            batch_size=size,
            rebatch=in_batches_of,
            alone=lambda: next(iter(one)),
        )

    return in_batches_of(batch_size or batch_sampler.batch_size)


def in_one_batch(
    dataloader: DataLoader[Any], indices: Sequence[int], seed: int = 0
) -> DataLoader[Any]:
    """Reads a few samples as a loader does, all in one batch and with one worker at most.

    Args:
        dataloader: A loader over a map-style data set.
        indices: Indices into the data set.
        seed: Seed of what the data set draws.

    Returns:
        A loader with one batch.
    """
    return _loader_over(dataloader, indices, len(indices), min(1, dataloader.num_workers), seed)


def trained_indices(dataloader: Iterable[Any]) -> list[int] | None:
    """Tells which samples of its data set a loader reads, each once, in ascending order.

    Args:
        dataloader: The client's samples.

    Returns:
        Indices into the data set; None for an iterable without indices.

    Raises:
        ValueError: If there are no samples, or the loader hides which ones the client trains on.
    """
    if not _is_map_style(dataloader):
        return None
    return _trained_indices(dataloader, _batch_sampler(dataloader).sampler)


class _Stream:
    """An iterable of batches whose first batch can be read beforehand and is not lost."""

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


def _loader_over(
    like: DataLoader[Any], indices: Sequence[int], size: int | None, workers: int, seed: int
) -> DataLoader[Any]:
    """Reads some samples in order, in all else as another loader does."""
    return DataLoader(
        like.dataset,
        batch_size=size,
        sampler=indices,
        collate_fn=like.collate_fn,
        num_workers=workers,
        worker_init_fn=like.worker_init_fn,
        multiprocessing_context=like.multiprocessing_context,
        timeout=like.timeout,
        generator=torch.Generator().manual_seed(seed),
    )


def _is_map_style(dataloader: Iterable[Any]) -> TypeGuard[DataLoader[Any]]:
    if not isinstance(dataloader, DataLoader) or isinstance(dataloader.dataset, IterableDataset):
        return False
    # A loader that makes its batches itself is read as it is.
    return type(dataloader).__iter__ is DataLoader.__iter__


def _batch_sampler(dataloader: DataLoader[Any]) -> BatchSampler:
    found = dataloader.batch_sampler
    # While it predicts, Lightning wraps it, to note which samples are in a batch.
    found = getattr(found, "_batch_sampler", found)
    if type(found) is not BatchSampler:
        raise ValueError(
            "a custom batch sampler, or batch_size=None, hides which samples the client trains on: "
            "pass `dataloader=` a plain DataLoader over them"
        )
    return found


def _trained_indices(dataloader: DataLoader[Any], sampler: Iterable[Any]) -> list[int]:
    """Finds the samples the loader trains on, each once, whatever its order and padding."""
    # While it predicts on several ranks, Lightning wraps the sampler as well.
    wrapped = getattr(getattr(sampler, "dataset", None), "_sampler", None)
    if wrapped is not None:
        return _trained_indices(dataloader, wrapped)
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
