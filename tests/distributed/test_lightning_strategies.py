"""What the shells ask of a Lightning strategy."""

from types import SimpleNamespace

import torch

from lightning_fedfisher.distributed.lightning_strategies import sum_over_ranks


def test_a_sum_over_ranks_is_that_of_the_strategy():
    asked = []

    def reduce(tensor, reduce_op):
        asked.append(reduce_op)
        return tensor * 2  # as two processes with the same tensor

    trainer = SimpleNamespace(strategy=SimpleNamespace(reduce=reduce))
    assert sum_over_ranks(trainer, torch.tensor([1.0, 2.0])).tolist() == [2.0, 4.0]
    assert asked == ["sum"]
