"""A rank that fails has all ranks fail, at the same meeting."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, local

import pytest
import torch
from torch import distributed

from lightning_fedfisher.distributed.failures import RankError, raise_together, shared_failures


@pytest.fixture
def run(monkeypatch):
    """Runs ranks that are threads, and returns what each returned or raised."""
    ranks, own = 3, local()
    barrier, told = Barrier(ranks, timeout=30), [None] * ranks

    def gather(found, text):
        told[own.rank] = text
        barrier.wait()
        found[:] = told
        barrier.wait()

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: ranks)
    monkeypatch.setattr(distributed, "all_gather_object", gather)

    def start(work):
        def of_rank(rank):
            own.rank = rank
            try:
                return work(rank)
            except Exception as error:
                return error

        with ThreadPoolExecutor(ranks) as pool:
            return list(pool.map(of_rank, range(ranks)))

    return start


def test_ranks_that_do_well_go_on(run):
    def work(rank):
        with shared_failures(lambda tensor: tensor + 1) as total:
            return float(total(total(torch.zeros(()))))

    assert run(work) == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("failing", [{1}, {0, 2}, {0, 1, 2}])
def test_all_fail_where_some_do(run, after, failing):
    def work(rank):
        with shared_failures(lambda tensor: tensor) as total:
            for step in range(2):
                if step == after and rank in failing:
                    raise ValueError(f"bad on {rank}")
                total(torch.zeros(()))
            if after == 2 and rank in failing:
                raise ValueError(f"bad on {rank}")
            return "done"

    for rank, found in enumerate(run(work)):
        if rank in failing:
            assert str(found) == f"bad on {rank}"
            assert type(found) is ValueError
        else:
            assert type(found) is RankError
            assert str(found) == f"rank {min(failing)} failed: ValueError: bad on {min(failing)}"


def test_of_two_ranks_the_first_to_fail_stops_the_other(run):
    def work(rank):
        with shared_failures(lambda tensor: tensor) as total:
            for step in range(3):
                if step == rank:
                    raise ValueError(f"bad on {rank}")
                total(torch.zeros(()))

    told = run(work)
    assert [str(error).split(":")[0] for error in told] == ["bad on 0"] + ["rank 0 failed"] * 2


def test_one_process_raises_as_ever():
    error = ValueError("bad")
    with pytest.raises(ValueError, match="bad") as told:
        raise_together(error)
    assert told.value is error
    with pytest.raises(ValueError, match="bad"), shared_failures(lambda tensor: tensor):
        raise error
