"""Reads offline W&B runs back from disk, with W&B's own reader."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

_COMMAND = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json"]


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
