"""The runs that clients and servers open, read back from disk."""

import pytest
import wandb
from helpers.wandb_runs import open_run, read_runs
from lightning.pytorch.loggers import WandbLogger

from lightning_fedfisher._utils.environment import provenance


def test_runs_of_a_federation_share_a_group_and_differ_in_their_job(tmp_path):
    for client in ("a", "b", None):
        open_run(tmp_path, client, tags=["x"], config={"alpha": 0.1}, notes="n").experiment.finish()
    runs = read_runs(tmp_path)
    assert {name: run.job_type for name, run in runs.items()} == {
        "a": "client",
        "b": "client",
        "server": "server",
    }
    assert {run.group for run in runs.values()} == {"clinics"}
    assert len({run.id for run in runs.values()}) == 3
    for run in runs.values():
        assert run.tags == ["x"]
        assert run.config["alpha"] == 0.1
        assert run.config["versions"]["torch"] == provenance()["versions"]["torch"]
        assert run.axes == {"trainer/global_step": None, "*": "trainer/global_step"}


def test_checkpoints_go_where_a_logger_of_its_own_would_put_them(tmp_path):
    logger = open_run(tmp_path, "a", project="p")
    other = WandbLogger(project="p", name="a", id=logger.version, save_dir=tmp_path)
    assert (logger.name, logger.version, logger.save_dir) == ("p", other.version, other.save_dir)
    assert logger.name == other.name
    wandb.finish()


def test_a_client_goes_on_in_its_own_run_and_no_other(tmp_path):
    def opened(*arguments, **options):
        run = open_run(tmp_path, *arguments, **options).experiment
        run.finish()
        return run.id

    first = opened("a")
    assert opened("a") == first
    others = [opened("b"), opened("a", "other"), opened("a", project="p"), opened("a", name="z")]
    assert len({first, *others, opened("server"), opened(None)}) == 7


def test_two_clients_never_share_a_run(tmp_path):
    logger = open_run(tmp_path, "a")
    try:
        with pytest.raises(ValueError, match=r"run a is still open, and b would go on in it"):
            open_run(tmp_path, "b")
        assert open_run(tmp_path, "a").experiment is logger.experiment
    finally:
        wandb.finish()
    open_run(tmp_path, "b").experiment.finish()
    assert sorted(read_runs(tmp_path)) == ["a", "b"]
