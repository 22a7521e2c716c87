"""Opens W&B runs offline, and reads them back from disk with W&B's own reader."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import wandb
from helpers.federation import quiet_trainer, tiny_loader, tiny_model
from lightning.pytorch.loggers import WandbLogger

from lightning_fedfisher import FedFisherCallback, federation_logger

_COMMAND = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json"]


def fit_client(output: Path, logger, **options) -> FedFisherCallback:
    """Trains a tiny client that writes its update to a file."""
    callback = FedFisherCallback(output, **options)
    trainer = quiet_trainer(output.parent, callbacks=[callback], logger=logger)
    trainer.fit(tiny_model(), tiny_loader())
    return callback


def open_run(
    root: Path, client: str | None = None, federation: str = "clinics", **options
) -> WandbLogger:
    """Opens an offline run below a folder."""
    options = {"mode": "offline", "save_dir": root} | options
    return federation_logger(federation, client, **options)


class FakeRun:
    """A run that is online, and keeps what it is told."""

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


def online_logger(run: FakeRun, log_model: bool | str) -> WandbLogger:
    """Makes a logger of a run that is online."""
    logger = WandbLogger(experiment=SimpleNamespace(), log_model=log_model)
    logger._experiment = run
    return logger


def read_runs(folder: Path) -> dict[str, SimpleNamespace]:
    """The runs below a folder, by name."""
    found = [_read(path) for path in sorted(folder.glob("wandb/offline-run-*"))]
    runs = {run.name: run for run in found}
    assert len(runs) == len(found), "runs of one name"
    return runs


def _read(folder: Path) -> SimpleNamespace:
    done = subprocess.run([*_COMMAND, str(folder)], capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    of_type = {kind: [r[kind] for r in records if r["type"] == kind] for kind in _TYPES}
    (run,) = of_type["run"]
    config = dict(run["config"]["update"])
    for update in of_type["config"]:
        config |= update.get("update", {})
    summary: dict = {}
    for update in of_type["summary"]:
        summary |= update.get("update", {})
    return SimpleNamespace(
        name=run["display_name"],
        id=run["run_id"],
        group=run["run_group"],
        job_type=run["job_type"],
        tags=run.get("tags", []),
        config=config,
        summary=summary,
        history=[record["item"] for record in of_type["history"]],
        axes={
            metric.get("name", metric.get("glob_name")): metric.get("step_metric")
            for metric in of_type["metric"]
        },
        charts={
            key.removeprefix("_wandb.visualize.")
            for key in config
            if key.startswith("_wandb.visualize.")
        },
        table=partial(_table, folder, summary),
    )


def _table(folder: Path, summary: dict, key: str) -> list[list]:
    """The rows of the table that was logged last under a key."""
    return json.loads((folder / "files" / summary[f"{key}.path"]).read_text())["data"]


_TYPES = ("run", "config", "summary", "history", "metric")
