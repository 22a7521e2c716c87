"""What fits into memory beside what, and how much is estimated."""

import pytest
import torch
from helpers.federation import tiny_updates

from lightning_fedfisher.merge.memory_budget import (
    MemoryBudget,
    peak_bytes,
    sent_bytes,
    working_dtype,
)


def test_layers_share_the_budget_and_one_alone_may_exceed_it():
    budget = MemoryBudget(100, [60, 40, 50, 1000])
    assert budget.fits(0, [1])
    assert not budget.fits(0, [1, 2])
    assert not budget.fits(2, [0])
    assert budget.fits(3, [])
    assert not budget.fits(3, [1])


def test_what_is_reserved_takes_room():
    budget = MemoryBudget(100, [60, 40])
    budget.reserved = 1
    assert not budget.fits(0, [1])
    assert budget.fits(0, [])
    assert budget.must_offload(100)
    assert not budget.must_offload(99)


@pytest.mark.parametrize("limit", [-1, -(2**40)])
def test_a_negative_budget_is_refused(limit):
    with pytest.raises(ValueError, match=f"must be at least 0 bytes, got {limit}"):
        MemoryBudget(limit, [])


@pytest.mark.parametrize(("curvature", "times"), [("kfac", 2), ("diagonal", 1), ("dense", 1)])
def test_the_estimate_is_what_is_sent_and_what_a_solver_writes_anew(curvature, times, tmp_path):
    updates = tiny_updates(tmp_path, curvature=curvature)
    for layer in updates[0].layers:
        assert working_dtype(updates[0], layer) == torch.float32
        sent = sum(
            4
            * (
                update.weights(layer).numel()
                + times * sum(map(torch.numel, block.tensors().values()))
            )
            for update in updates
            for block in [update.block(layer)]
        )
        assert sent_bytes(updates[0].header, len(updates), layer) == sent
    header, clients = updates[0].header, len(updates)
    sizes = [sent_bytes(header, clients, layer) for layer in header.layers]
    limits = 2**30, max(sizes)
    large, small = (peak_bytes(header, clients, MemoryBudget(n, sizes)) for n in limits)
    assert large - small == sum(sizes) - max(sizes) > 0
    # A layer that exceeds the budget alone is in memory with all weights, whatever the budget.
    least = peak_bytes(header, clients, MemoryBudget(0, sizes))
    assert least == peak_bytes(header, clients, MemoryBudget(100, sizes)) < small


def test_the_estimate_counts_a_step_where_nothing_is_decomposed(tmp_path):
    (update,) = tiny_updates(tmp_path, clients=1, epochs=1, curvature="identity")
    budget = MemoryBudget(2**30, sizes=[100, 0, 0, 0])
    assert peak_bytes(update.header, 1, budget) == 3 * 4 * 265 + 100 + 9 * 8 * 4 * 28
