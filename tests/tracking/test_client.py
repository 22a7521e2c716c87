"""What clients log, by their callbacks, and by the functions that these call."""

import csv

import pytest
import wandb
from helpers.federation import quiet_trainer, tiny_loader, tiny_model
from helpers.twins import twin_of
from helpers.wandb_runs import FakeRun, fit_client, online_logger, open_run, read_runs
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lightning_fedfisher import FedFisherCallback, FisherMergeModule
from lightning_fedfisher.curvature.summary import CurvatureSummary
from lightning_fedfisher.tracking import client
from lightning_fedfisher.tracking.client import log_update, warn_of_used_runs


def test_a_second_client_in_one_run_is_warned_of(tmp_path, recwarn):
    try:
        for name in ("a", "b"):
            logger = WandbLogger(name="run", save_dir=tmp_path, mode="offline")
            fit_client(tmp_path / f"{name}.safetensors", logger)
            told = [str(w.message) for w in recwarn if "already holds" in str(w.message)]
            assert len(told) == (name == "b")
    finally:
        wandb.finish()
    assert "call wandb.finish() between clients" in told[0]


@pytest.mark.parametrize("loggers", [False, [], True])
def test_without_w_and_b_nothing_is_missing_but_w_and_b(loggers, tmp_path):
    csv_logger = CSVLogger(tmp_path, name="", version="log")
    callback = fit_client(tmp_path / "u.safetensors", csv_logger if loggers is True else loggers)
    module = FisherMergeModule([callback.path] * 2, allow_duplicates=True)
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


def test_the_logger_of_lightnings_other_package_is_w_and_bs_as_well(update):
    run = FakeRun()
    logger = twin_of(WandbLogger, _log_model=True, experiment=run, log_metrics=lambda *_, **__: 0)()
    layers = [CurvatureSummary("a", trace=1.0, effective_rank=1.0)]
    logger.log_table = lambda key, *_, **__: run.summary.update({key: "table"})
    log_update([logger], "fedfisher", update, layers, {}, 3)
    assert {"fedfisher/update", "fedfisher/digest", "fedfisher/curvature"} <= {*run.summary}
    assert len(run.logged) == 1
    run.name = "run"
    with pytest.warns(UserWarning, match="already holds a client's update"):
        warn_of_used_runs([logger])


def test_a_long_extraction_tells_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "_SECONDS_BETWEEN_LOGS", 0)
    logger = open_run(tmp_path, "a")
    fit_client(tmp_path / "u.safetensors", logger, batch_size=5)
    wandb.finish()
    run = read_runs(tmp_path)["a"]
    assert run.axes["fedfisher/extracted_samples"] == "fedfisher/extraction_seconds"
    told = [item for item in run.history if "fedfisher/extracted_samples" in item]
    assert [item["fedfisher/extracted_samples"] for item in told] == [5, 10, 15, 20, 21]
    seconds = [item["fedfisher/extraction_seconds"] for item in told]
    assert 0 < seconds[0] < seconds[-1] <= run.summary["fedfisher/extraction_seconds"]


def test_a_short_extraction_does_not(tmp_path):
    logger = open_run(tmp_path, "a")
    fit_client(tmp_path / "u.safetensors", logger, batch_size=5)
    wandb.finish()
    assert "fedfisher/extracted_samples" not in read_runs(tmp_path)["a"].summary


def test_callbacks_side_by_side_do_not_overwrite_each_other(tmp_path):
    kinds = ("kfac", "diagonal", "identity")
    callbacks = [FedFisherCallback(tmp_path / f"{kind}.st", curvature=kind) for kind in kinds]
    logger = open_run(tmp_path, "a")
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


@pytest.mark.parametrize("log_model", [False, True, "all"])
def test_updates_go_to_w_and_b_only_if_models_may(log_model, update):
    run = FakeRun()
    log_update([online_logger(run, log_model)], "fedfisher", update, [], {}, 0)
    assert run.summary == {"fedfisher/update": update.source, "fedfisher/digest": update.digest}
    assert len(run.logged) == bool(log_model)
    for artifact in run.logged:
        assert artifact.name == f"client-update-{update.digest[:16]}"
        assert artifact.type == "client-update"
        assert artifact.metadata == {"digest": update.digest, "num_samples": update.num_samples}
        assert list(artifact.manifest.entries) == ["u.safetensors"]


def test_an_offline_run_names_the_file_and_keeps_it_to_itself(update, tmp_path):
    logger = open_run(tmp_path, "a", log_model=True)
    log_update([logger], "fedfisher", update, [], {}, 0)
    wandb.finish()
    (run,) = read_runs(tmp_path).values()
    assert run.summary["fedfisher/update"] == update.source
    assert not list((tmp_path / "wandb").glob("*/files/*safetensors"))


def test_curvature_without_eigenvalues_has_a_table_and_no_chart(update, tmp_path):
    logger = open_run(tmp_path, "a")
    told = [CurvatureSummary("a", 0.0, 0.0, [0.0, 0.0]), CurvatureSummary("b", 1.0, 2.0)]
    log_update([logger], "fedfisher", update, told, {}, 0)
    wandb.finish()
    run = read_runs(tmp_path)["a"]
    assert run.table("fedfisher/curvature") == [["a", 0, 0], ["b", 1, 2]]
    assert run.charts == set()


def test_a_spectrum_shows_shares_of_the_largest_eigenvalue(update, tmp_path):
    logger = open_run(tmp_path, "a")
    told = [
        CurvatureSummary("a", 11.1, 2.0, [10.0, 1.0, 0.1, 0.0]),
        CurvatureSummary("b", 1, 1, [1]),
    ]
    log_update([logger], "fedfisher", update, told, {}, 0)
    wandb.finish()
    run = read_runs(tmp_path)["a"]
    rows = run.table("fedfisher/spectrum_table")
    assert [row for row in rows if row[1] == "a"] == [
        [0, "a", 0],
        [pytest.approx(1 / 3), "a", pytest.approx(-1)],
        [pytest.approx(2 / 3), "a", pytest.approx(-2)],
    ]
