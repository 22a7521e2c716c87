"""Ranks: which process this is, and what the process of rank 0 has."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_fedfisher.distributed.processes import (
    Shard,
    is_rank_zero,
    process_rank,
    warn_on_rank_zero,
)


def test_rank_zero_is_what_lightning_says(monkeypatch):
    for rank in (0, 3):
        monkeypatch.setattr(rank_zero_only, "rank", rank, raising=False)
        assert is_rank_zero() == (rank == 0)
        assert process_rank() == rank
    monkeypatch.delattr(rank_zero_only, "rank")
    assert is_rank_zero()
    assert process_rank() == 0


def test_first_is_the_tensor_of_rank_zero():
    tensors = [torch.tensor([0.1, -3.0]), torch.tensor([7.0, 1e30])]
    passed = [Shard(rank, 2, lambda t: t).first(tensor) for rank, tensor in enumerate(tensors)]
    assert torch.equal(sum(passed), tensors[0])
    assert torch.equal(tensors[1], torch.tensor([7.0, 1e30]))  # a reduction may work in place


def test_processes_need_no_lightning():
    code = (
        "import sys, lightning_fedfisher.distributed.processes as p; "
        "assert p.is_rank_zero(); "
        "assert 'lightning_fedfisher.distributed.lightning_strategies' not in p.__dict__"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_the_launcher_tells_the_rank_before_lightning_does(name):
    script = (
        "import sys, lightning_fedfisher.distributed.processes as p; "
        "assert 'lightning' not in sys.modules; print(p.is_rank_zero())"
    )
    clean = {key: value for key, value in os.environ.items() if "RANK" not in key}
    for rank, told in (("0", "True"), ("1", "False")):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=clean | {name: rank},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == told


def test_warnings_come_from_rank_zero_whether_lightning_is_there_or_not(monkeypatch):
    for rank in (None, 0):
        monkeypatch.setattr(rank_zero_only, "rank", rank, raising=False)
        with pytest.warns(UserWarning, match="beware"):
            warn_on_rank_zero("beware")
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_on_rank_zero("beware")
