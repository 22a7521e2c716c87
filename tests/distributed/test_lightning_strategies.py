"""What the shells ask of a Lightning strategy."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from helpers.twins import twin_of
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _XLALauncher

from lightning_fedfisher.distributed.lightning_strategies import (
    on_rank_zero,
    require_whole_model,
    sum_over_ranks,
)


def test_a_sum_over_ranks_is_that_of_the_strategy():
    asked = []

    def reduce(tensor, reduce_op):
        asked.append(reduce_op)
        return tensor * 2  # as two processes with the same tensor

    trainer = SimpleNamespace(strategy=SimpleNamespace(reduce=reduce))
    assert sum_over_ranks(trainer, torch.tensor([1.0, 2.0])).tolist() == [2.0, 4.0]
    assert asked == ["sum"]


def _trainer(strategy, launcher=object):
    return SimpleNamespace(strategy=type("Own", (strategy,), {"launcher": launcher()})())


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_shard_are_refused_in_both_packages(strategy):
    with pytest.raises(ValueError, match=r"Who needs the whole model .* shards it"):
        require_whole_model(_trainer(twin_of(strategy)), "Who")


def test_processes_that_take_the_result_with_them_are_refused_in_both_packages():
    spawns = twin_of(_MultiProcessingLauncher)
    for launcher in (spawns, twin_of(_XLALauncher, spawns)):
        with pytest.raises(ValueError, match="spawned or forked"):
            require_whole_model(_trainer(twin_of(DDPStrategy), launcher), "Who")


def test_whole_models_are_taken_in_both_packages():
    for strategy in (DDPStrategy, twin_of(DDPStrategy)):
        require_whole_model(_trainer(strategy), "Who")


def test_what_rank_zero_does_all_ranks_learn():
    def refuse():
        raise OSError("full")

    sent = []
    for work, told in ((lambda: 7, 7), (refuse, "full")):
        for zero in (True, False):

            def broadcast(done, zero=zero):
                sent.append(pickle.dumps(done))
                return pickle.loads(sent[-1] if zero else sent[-2])

            trainer = SimpleNamespace(
                is_global_zero=zero, strategy=SimpleNamespace(broadcast=broadcast)
            )
            here = work if zero else pytest.fail
            if told == 7:
                assert on_rank_zero(trainer, here) == 7
            else:
                with pytest.raises(OSError, match=told):
                    on_rank_zero(trainer, here)
