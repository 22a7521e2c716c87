"""Samples are partitioned seeded, unpadded and each exactly once, and draws belong to samples."""

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_fedfisher.distributed.processes import Shard
from lightning_fedfisher.extraction.sampling import most_samples, partition_samples

SAMPLES = 21


class _Numbers(Dataset):
    """Sample i is the number i."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return torch.tensor(int(index))


def _read(partition):
    return [batch.tolist() for batch in partition.batches]


def _flat(partition):
    return [number for batch in _read(partition) for number in batch]


def _loader(**options):
    return DataLoader(_Numbers(), **{"batch_size": 4} | options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shuffle": True},
        {"shuffle": True, "drop_last": True},
        {"sampler": SequentialSampler(_Numbers())},
        {"sampler": RandomSampler(_Numbers(), num_samples=5)},
        {"sampler": DistributedSampler(_Numbers(), num_replicas=4, rank=1)},
        {"sampler": list(reversed(range(SAMPLES)))},
        {"sampler": range(SAMPLES)},
    ],
    ids=["plain", "shuffled", "drop_last", "sequential", "random", "distributed", "list", "range"],
)
def test_every_sample_once_and_in_order(options):
    partition = partition_samples(_loader(**options))
    assert _flat(partition) == list(range(SAMPLES))
    assert [len(batch) for batch in _read(partition)] == [4, 4, 4, 4, 4, 1]
    assert partition.count == partition.population == SAMPLES


@pytest.mark.parametrize(
    "sampler",
    [SubsetRandomSampler([9, 2, 9, 5]), [9, 2, 9, 5], (9, 2, 5)],
    ids=["subset sampler", "list", "tuple"],
)
def test_a_subset_of_the_samples(sampler):
    partition = partition_samples(_loader(sampler=sampler))
    assert _flat(partition) == [2, 5, 9]
    assert partition.count == partition.population == 3


def test_a_subset_given_as_a_tensor_holds_each_sample_once():
    partition = partition_samples(_loader(sampler=SubsetRandomSampler(torch.tensor([9, 2, 9, 5]))))
    assert _flat(partition) == [2, 5, 9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": WeightedRandomSampler([1.0] * SAMPLES, SAMPLES)}, "WeightedRandomSampler"),
        ({"sampler": RandomSampler(_Numbers(), replacement=True)}, "RandomSampler hides"),
        ({"sampler": type("Mine", (SequentialSampler,), {})(_Numbers())}, "Mine hides"),
        (
            {"batch_size": 1, "batch_sampler": type("Mine", (BatchSampler,), {})([0], 2, False)},
            "custom batch sampler",
        ),
        ({"sampler": []}, "holds no samples"),
    ],
    ids=["weighted", "replacement", "subclass", "batch sampler", "empty"],
)
def test_what_cannot_be_dealt_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        partition_samples(_loader(**options))


@pytest.mark.parametrize("max_samples", [0, -1])
def test_max_samples_below_one(max_samples):
    with pytest.raises(ValueError, match="at least 1"):
        partition_samples(_loader(), max_samples=max_samples)


def test_max_samples_is_seeded_and_within_the_population():
    sampler = SubsetRandomSampler(range(3, 18))
    subsets = [
        partition_samples(_loader(sampler=sampler), max_samples=6, seed=seed) for seed in (0, 0, 1)
    ]
    assert {(partition.count, partition.population) for partition in subsets} == {(6, 15)}
    first, again, other = (_flat(partition) for partition in subsets)
    assert first == again == sorted(set(first))
    assert len(first) == 6
    assert set(first) <= set(range(3, 18))
    assert other != first


def test_every_sample_is_as_likely():
    counts = np.zeros(SAMPLES)
    for seed in range(400):
        counts[_flat(partition_samples(_loader(), max_samples=7, seed=seed))] += 1
    # A third of 400, give or take four standard deviations.
    assert abs(counts - 400 / 3).max() < 4 * np.sqrt(400 * (1 / 3) * (2 / 3))


@pytest.mark.parametrize("world_size", [1, 2, 3, 30])
@pytest.mark.parametrize("max_samples", [None, 10])
def test_processes_share_the_samples(world_size, max_samples):
    alone = partition_samples(_loader(), max_samples=max_samples)
    shares = [
        partition_samples(
            _loader(shuffle=True), max_samples=max_samples, shard=Shard(rank, world_size)
        )
        for rank in range(world_size)
    ]
    assert {(share.count, share.population) for share in shares} == {
        (alone.count, alone.population)
    }
    read = [_flat(share) for share in shares]
    assert sorted(number for numbers in read for number in numbers) == _flat(alone)
    sizes = [len(numbers) for numbers in read]
    assert max(sizes) - min(sizes) <= 1


def test_batch_size_and_collate_function_of_the_loader():
    def collate(samples):
        return -torch.stack(samples)

    loader = _loader(collate_fn=collate, shuffle=True)
    assert _read(partition_samples(loader))[0] == [0, -1, -2, -3]
    assert [len(b) for b in _read(partition_samples(loader, batch_size=8))] == [8, 8, 5]


def test_the_loaders_own_order_is_not_disturbed():
    def order(loader):
        return [number for batch in loader for number in batch.tolist()]

    loaders = [_loader(shuffle=True, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    _flat(partition_samples(loaders[0]))
    assert torch.equal(torch.get_rng_state(), state)
    assert order(loaders[0]) == order(loaders[1])


class _Stream(IterableDataset):
    def __iter__(self):
        return iter(_Numbers()[i] for i in range(SAMPLES))


def _iterable(form):
    return {
        "list": list(_loader()),
        "generator": iter(list(_loader())),
        "stream": DataLoader(_Stream(), batch_size=4),
    }[form]


@pytest.mark.parametrize("form", ["list", "generator", "stream"])
def test_other_iterables_are_read_as_they_come(form):
    partition = partition_samples(_iterable(form), max_samples=3)
    assert (partition.count, partition.population, partition.indices) == (None, None, None)
    assert _flat(partition) == list(range(SAMPLES))
    with pytest.raises(ValueError, match="cannot be partitioned over processes"):
        partition_samples(_iterable(form), shard=Shard(0, 2))


@pytest.mark.parametrize("max_samples", [None, 10])
@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("sizes", [(1,), (4,), (2, 3, 1)])
def test_draws_belong_to_samples(max_samples, world_size, sizes):
    count = max_samples or SAMPLES
    rows = np.stack([np.random.default_rng((7, place)).random(2) for place in range(count)])
    for rank in range(world_size):
        partition = partition_samples(
            _loader(), max_samples=max_samples, shard=Shard(rank, world_size)
        )
        uniforms, drawn = partition.uniforms(7), []
        left = len(range(rank, count, world_size))
        while left:
            size = min(left, sizes[len(drawn) % len(sizes)])
            drawn.append(uniforms(size, 2))
            assert drawn[-1].shape == (size, 2)
            left -= size
        assert np.array_equal(torch.cat(drawn).numpy(), rows[rank::world_size])


def test_the_first_draws_do_not_depend_on_their_number():
    few, many = (partition_samples(_loader()).uniforms(7)(SAMPLES, n) for n in (2, 5))
    assert torch.equal(few, many[:, :2])
    assert len(many.unique()) == many.numel()


def test_draws_depend_on_the_seed():
    one, again, other = (
        partition_samples(_loader()).uniforms(seed)(SAMPLES, 2) for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not (one == other).any()


def test_draws_of_an_iterable_are_seeded_and_fresh_for_every_sample():
    one, again = (
        torch.cat([uniforms(4, 3), uniforms(8, 3), uniforms(9, 3)])
        for uniforms in (partition_samples(list(_loader())).uniforms(7) for _ in range(2))
    )
    assert torch.equal(one, again)
    assert len(one.unique()) == one.numel()


def test_another_batch_size_gives_the_same_samples_and_draws():
    partition = partition_samples(_loader(), max_samples=10, shard=Shard(1, 2))
    smaller = partition.rebatch(2)
    assert (partition.batch_size, smaller.batch_size) == (4, 2)
    assert [len(batch) for batch in _read(smaller)] == [2, 2, 1]
    assert _flat(smaller) == _flat(partition)
    assert torch.equal(smaller.uniforms(7)(5, 3), partition.uniforms(7)(5, 3))
    assert (smaller.count, smaller.population, smaller.indices) == (10, 21, range(1, 10, 2))


def test_an_iterable_has_no_other_batch_size():
    partition = partition_samples(list(_loader()))
    assert partition.rebatch is None
    assert partition.batch_size is None


@pytest.mark.parametrize("shard", [Shard(0, 1), Shard(0, 3), Shard(2, 3)])
def test_every_process_previews_the_same_samples(shard):
    partition = partition_samples(_loader(sampler=range(5, 19)), shard=shard)
    for _ in range(2):
        assert partition.preview().tolist() == [5, 6, 7]
    few = partition_samples(_loader(sampler=[3, 1]), shard=shard)
    assert few.preview().tolist() == [1, 3, 1]
    assert _flat(partition) == list(range(5, 19))[shard.rank :: shard.world_size]


@pytest.mark.parametrize("form", ["list", "generator", "stream"])
def test_a_preview_takes_no_sample_away(form):
    partition = partition_samples(_iterable(form))
    assert partition.preview().tolist() == [0, 1, 2, 3]
    assert _flat(partition) == list(range(SAMPLES))
    assert partition.again == (form != "generator")
    assert _flat(partition) == (list(range(SAMPLES)) if partition.again else [])


@pytest.mark.parametrize("form", ["list", "generator", "stream"])
def test_a_second_preview_takes_no_sample_away_either(form):
    partition = partition_samples(_iterable(form))
    for _ in range(2):
        assert partition.preview().tolist() == [0, 1, 2, 3]
    assert _flat(partition) == list(range(SAMPLES))


def test_an_empty_iterable_has_no_preview():
    with pytest.raises(ValueError, match="holds no samples"):
        partition_samples([]).preview()


def test_the_first_process_tells_the_others():
    tensors = [torch.full((2,), float(rank + 1)) for rank in range(3)]
    passed = []
    for rank, tensor in enumerate(tensors):
        Shard(rank, 3, lambda t: passed.append(t) or t).first(tensor)
    assert torch.equal(sum(passed), tensors[0])
    assert Shard().first(tensors[1]) is tensors[1]


@pytest.mark.parametrize(
    ("population", "most"),
    [(3, 3), (300, 300), (301, 300), (3600, 300), (3612, 301), (60000, 5000)],
)
def test_auto_takes_a_twelfth_but_no_fewer_than_300(population, most):
    assert most_samples("auto", population) == most


def test_most_samples():
    assert most_samples(None, 7) == most_samples(9, 7) == 7
    assert most_samples(5, 7) == 5
