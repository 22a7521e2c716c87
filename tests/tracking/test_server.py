"""What servers log."""

import math
from types import SimpleNamespace

import pytest
import torch
import wandb
from helpers.twins import twin_of
from helpers.wandb_runs import FakeRun, online_logger, read_runs
from lightning.pytorch.loggers import WandbLogger

from lightning_fedfisher.tracking.server import define_merge_axes, log_merge, log_merged_model


def test_a_merged_model_is_made_from_the_updates_that_clients_uploaded(update, tmp_path):
    name = f"client-update-{update.digest[:16]}:latest"
    (tmp_path / "m.safetensors").write_bytes(b"model")
    run = FakeRun(known=[name])
    log_merged_model(online_logger(run, True), tmp_path / "m.safetensors", [update])
    assert run.used == [name]
    assert [(artifact.name, artifact.type) for artifact in run.logged] == [
        ("merged-model", "model")
    ]
    run = FakeRun()
    with pytest.warns(UserWarning, match=r"does not have the update .*u\.safetensors"):
        log_merged_model(online_logger(run, True), tmp_path / "m.safetensors", [update])
    assert len(run.logged) == 1
    run = FakeRun(known=[name])
    log_merged_model(online_logger(run, False), tmp_path / "m.safetensors", [update])
    assert run.used == run.logged == []
    assert run.summary == {"merged_model": str(tmp_path / "m.safetensors")}


def test_the_logger_of_lightnings_other_package_is_w_and_bs_as_well():
    told, run = {}, SimpleNamespace(define_metric=lambda name, **axis: told.update({name: axis}))
    logger = twin_of(
        WandbLogger,
        experiment=run,
        _prefix="",
        log_metrics=lambda *_, **__: None,
        log_table=lambda _, key, titles, rows, step: told.update({key: rows}),
    )()
    define_merge_axes([logger])
    log_merge([logger], ["a"], ["x", "y"], torch.ones(1, 2), torch.ones(1, 2, 3), 0)
    assert {"residual", "objective", "clients"} == {*told}


def test_infinite_numbers_reach_the_run(logger, tmp_path):
    module = SimpleNamespace(layers=["a"], distances=torch.tensor([[math.inf, 1.0]]))
    log_merge([logger], module.layers, ["x", "y"], module.distances, torch.ones(1, 2, 3), 0)
    wandb.finish()
    run = read_runs(tmp_path)["server"]
    assert run.summary["distance/y"] == 1
    assert run.summary["distance/x"] == "Infinity"
