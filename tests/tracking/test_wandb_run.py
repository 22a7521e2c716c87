import csv
import math
import subprocess
from types import SimpleNamespace

import pytest
import torch
import wandb
from helpers.federation import quiet_trainer, tiny_loader, tiny_model
from helpers.wandb_runs import read_runs
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lightning_fedfisher import ClientUpdate, FedFisherCallback, FisherMergeModule
from lightning_fedfisher.results.record import (
    FederationRecord,
    LayerCurvature,
    MergeRecord,
    ModelScore,
)
from lightning_fedfisher.tracking import wandb_run as tracking
from lightning_fedfisher.tracking.wandb_run import (
    federation_logger,
    log_federation,
    log_merged_model,
    log_update,
    provenance,
)


def _fit(output, logger, **options):
    callback = FedFisherCallback(output, **options)
    trainer = quiet_trainer(output.parent, callbacks=[callback], logger=logger)
    trainer.fit(tiny_model(), tiny_loader())
    return callback


def _open(root, client=None, federation="clinics", **options):
    options = {"mode": "offline", "save_dir": root} | options
    return federation_logger(federation, client, **options)


@pytest.fixture
def logger(tmp_path):
    """Of a server's run that is open."""
    opened = _open(tmp_path)
    yield opened
    wandb.finish()


def test_runs_of_a_federation_share_a_group_and_differ_in_their_job(tmp_path):
    for client in ("a", "b", None):
        _open(tmp_path, client, tags=["x"], config={"alpha": 0.1}, notes="n").experiment.finish()
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
    logger = _open(tmp_path, "a", project="p")
    other = WandbLogger(project="p", name="a", id=logger.version, save_dir=tmp_path)
    assert (logger.name, logger.version, logger.save_dir) == ("p", other.version, other.save_dir)
    assert logger.name == other.name
    wandb.finish()


def test_a_client_goes_on_in_its_own_run_and_no_other(tmp_path):
    def opened(*arguments, **options):
        run = _open(tmp_path, *arguments, **options).experiment
        run.finish()
        return run.id

    first = opened("a")
    assert opened("a") == first
    others = [opened("b"), opened("a", "other"), opened("a", project="p"), opened("a", name="z")]
    assert len({first, *others, opened("server"), opened(None)}) == 7


def test_two_clients_never_share_a_run(tmp_path):
    logger = _open(tmp_path, "a")
    try:
        with pytest.raises(ValueError, match=r"run a is still open, and b would go on in it"):
            _open(tmp_path, "b")
        assert _open(tmp_path, "a").experiment is logger.experiment
    finally:
        wandb.finish()
    _open(tmp_path, "b").experiment.finish()
    assert sorted(read_runs(tmp_path)) == ["a", "b"]


def test_a_second_client_in_one_run_is_warned_of(tmp_path, recwarn):
    try:
        for client in ("a", "b"):
            logger = WandbLogger(name="run", save_dir=tmp_path, mode="offline")
            _fit(tmp_path / f"{client}.safetensors", logger)
            told = [str(w.message) for w in recwarn if "already holds" in str(w.message)]
            assert len(told) == (client == "b")
    finally:
        wandb.finish()
    assert "call wandb.finish() between clients" in told[0]


def test_a_folder_without_git_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance()["git"] is None
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    monkeypatch.setenv("PATH", "")
    assert provenance()["git"] is None


def test_a_repository_has_a_commit_and_says_if_it_was_changed(tmp_path, monkeypatch):
    def git(*command):
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        done = subprocess.run(["git", *identity, *command], cwd=tmp_path, capture_output=True)
        return done.stdout.decode().strip()

    git("init")
    git("commit", "--allow-empty", "-m", "m")
    monkeypatch.chdir(tmp_path)
    assert provenance()["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/file").touch()
    monkeypatch.chdir(tmp_path / "sub")
    assert provenance()["git"]["dirty"]


@pytest.mark.parametrize("loggers", [False, [], True])
def test_without_w_and_b_nothing_is_missing_but_w_and_b(loggers, tmp_path):
    csv_logger = CSVLogger(tmp_path, name="", version="log")
    callback = _fit(tmp_path / "u.safetensors", csv_logger if loggers is True else loggers)
    module = FisherMergeModule([callback.path] * 2)
    merging = CSVLogger(tmp_path, name="", version="merge")
    quiet_trainer(tmp_path, max_epochs=-1, logger=merging if loggers is True else loggers).fit(
        module
    )
    if loggers is not True:
        return
    with (tmp_path / "log/metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    layers = [layer.name for layer in callback.update.layers]
    assert set(row) == {
        "step",
        *(f"fedfisher/{n}" for n in ("extraction_seconds", "curvature_samples", "upload_bytes")),
        *(f"fedfisher/{n}/{layer}" for n in ("trace", "effective_rank") for layer in layers),
    }
    with (tmp_path / "merge/metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["influence/client-0"]) == pytest.approx(1)
    assert float(last["distance/client-1"]) == pytest.approx(0, abs=1e-6)


def test_a_long_extraction_tells_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "_EVERY_SECONDS", 0)
    logger = _open(tmp_path, "a")
    _fit(tmp_path / "u.safetensors", logger, batch_size=5)
    wandb.finish()
    run = read_runs(tmp_path)["a"]
    assert run.axes["fedfisher/extracted_samples"] == "fedfisher/extraction_seconds"
    told = [item for item in run.history if "fedfisher/extracted_samples" in item]
    assert [item["fedfisher/extracted_samples"] for item in told] == [5, 10, 15, 20, 21]
    seconds = [item["fedfisher/extraction_seconds"] for item in told]
    assert 0 < seconds[0] < seconds[-1] <= run.summary["fedfisher/extraction_seconds"]


def test_a_short_extraction_does_not(tmp_path):
    logger = _open(tmp_path, "a")
    _fit(tmp_path / "u.safetensors", logger, batch_size=5)
    wandb.finish()
    assert "fedfisher/extracted_samples" not in read_runs(tmp_path)["a"].summary


def test_callbacks_side_by_side_do_not_overwrite_each_other(tmp_path):
    kinds = ("kfac", "diagonal", "identity")
    callbacks = [FedFisherCallback(tmp_path / f"{kind}.st", curvature=kind) for kind in kinds]
    logger = _open(tmp_path, "a")
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, logger=logger)
    trainer.fit(tiny_model(), tiny_loader())
    wandb.finish()
    run = read_runs(tmp_path)["a"]
    assert run.charts == {"fedfisher/spectrum"}
    for kind, callback in zip(kinds, callbacks, strict=True):
        first = kind == kinds[0]
        # Without a Fisher type in its header, as the identity is, it has the callback's.
        fisher = callback.update.header.fisher or "normalised"
        prefix = "fedfisher" if first else f"fedfisher/{kind}-{fisher}"
        assert run.summary[f"{prefix}/upload_bytes"] == callback.path.stat().st_size
        assert run.summary[f"{prefix}/digest"] == callback.update.digest
        traces = [name for name in run.summary if name.startswith(f"{prefix}/trace/")]
        assert len(traces) == (0 if kind == "identity" else 4)  # the identity says nothing


class FakeRun:
    """A run that is online."""

    offline = False

    def __init__(self, known=()):
        self.summary, self.used, self.logged, self.known = {}, [], [], known

    def log(self, *_):
        pass

    def use_artifact(self, name):
        if name not in self.known:
            raise wandb.errors.CommError("no such artifact")
        self.used.append(name)

    def log_artifact(self, artifact):
        self.logged.append(artifact)


def _online(run, log_model):
    logger = WandbLogger(experiment=SimpleNamespace(), log_model=log_model)
    logger._experiment = run
    return logger


@pytest.fixture(scope="module")
def update(tmp_path_factory):
    path = tmp_path_factory.mktemp("update") / "u.safetensors"
    return ClientUpdate.open(_fit(path, False).path)


@pytest.mark.parametrize("log_model", [False, True, "all"])
def test_updates_go_to_w_and_b_only_if_models_may(log_model, update):
    run = FakeRun()
    log_update([_online(run, log_model)], "fedfisher", update, [], {}, 0)
    assert run.summary == {"fedfisher/update": update.source, "fedfisher/digest": update.digest}
    assert len(run.logged) == bool(log_model)
    for artifact in run.logged:
        assert artifact.name == f"client-update-{update.digest[:16]}"
        assert artifact.type == "client-update"
        assert artifact.metadata == {"digest": update.digest, "num_samples": update.num_samples}
        assert list(artifact.manifest.entries) == ["u.safetensors"]


def test_a_merged_model_is_made_from_the_updates_that_clients_uploaded(update, tmp_path):
    name = f"client-update-{update.digest[:16]}:latest"
    (tmp_path / "m.safetensors").write_bytes(b"model")
    run = FakeRun(known=[name])
    log_merged_model(_online(run, True), tmp_path / "m.safetensors", [update])
    assert run.used == [name]
    assert [(artifact.name, artifact.type) for artifact in run.logged] == [
        ("merged-model", "model")
    ]
    run = FakeRun()
    with pytest.warns(UserWarning, match=r"does not have the update .*u\.safetensors"):
        log_merged_model(_online(run, True), tmp_path / "m.safetensors", [update])
    assert len(run.logged) == 1
    run = FakeRun(known=[name])
    log_merged_model(_online(run, False), tmp_path / "m.safetensors", [update])
    assert run.used == run.logged == []
    assert run.summary == {"merged_model": str(tmp_path / "m.safetensors")}


def test_an_offline_run_names_the_file_and_keeps_it_to_itself(update, tmp_path):
    logger = _open(tmp_path, "a", log_model=True)
    log_update([logger], "fedfisher", update, [], {}, 0)
    wandb.finish()
    (run,) = read_runs(tmp_path).values()
    assert run.summary["fedfisher/update"] == update.source
    assert not list((tmp_path / "wandb").glob("*/files/*safetensors"))


def test_curvature_without_eigenvalues_has_a_table_and_no_chart(update, tmp_path):
    logger = _open(tmp_path, "a")
    told = [LayerCurvature("a", 0.0, 0.0, [0.0, 0.0]), LayerCurvature("b", 1.0, 2.0)]
    log_update([logger], "fedfisher", update, told, {}, 0)
    wandb.finish()
    run = read_runs(tmp_path)["a"]
    assert run.table("fedfisher/curvature") == [["a", 0, 0], ["b", 1, 2]]
    assert run.charts == set()


def test_a_spectrum_shows_shares_of_the_largest_eigenvalue(update, tmp_path):
    logger = _open(tmp_path, "a")
    told = [LayerCurvature("a", 11.1, 2.0, [10.0, 1.0, 0.1, 0.0]), LayerCurvature("b", 1, 1, [1])]
    log_update([logger], "fedfisher", update, told, {}, 0)
    wandb.finish()
    run = read_runs(tmp_path)["a"]
    rows = run.table("fedfisher/spectrum_table")
    assert [row for row in rows if row[1] == "a"] == [
        [0, "a", 0],
        [pytest.approx(1 / 3), "a", pytest.approx(-1)],
        [pytest.approx(2 / 3), "a", pytest.approx(-2)],
    ]


def test_a_federation_that_was_not_tested_is_shown_without_scores(logger, tmp_path):
    score = ModelScore(50.0, 1.0, 2.0)  # without a confusion matrix
    bare = FederationRecord("t", [], [MergeRecord("fedavg", [])])
    log_federation(logger, bare)
    log_federation(logger, FederationRecord("t", [], [MergeRecord("m", [], score=score)]))
    wandb.finish()
    run = read_runs(tmp_path)["server"]
    assert run.charts == {"accuracy"}
    assert run.table("comparison") == [["m", 50, 1, 2, None, None, None, None, 0]]


def test_infinite_numbers_reach_the_run(logger, tmp_path):
    module = SimpleNamespace(layers=["a"], distances=torch.tensor([[math.inf, 1.0]]))
    from lightning_fedfisher.tracking.wandb_run import log_merge

    log_merge([logger], module.layers, ["x", "y"], module.distances, torch.ones(1, 2, 3), 0)
    wandb.finish()
    run = read_runs(tmp_path)["server"]
    assert run.summary["distance/y"] == 1
    assert run.summary["distance/x"] == "Infinity"
