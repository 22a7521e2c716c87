"""Merges update files in a process of its own, and writes the time and memory that it took.

`measure_merge` starts the process; under DDP, Lightning starts one more for each further device.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_only
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import override

from simulation.clients import QUIET, merge
from simulation.memory import status_bytes


def measure_merge(
    folder: Path, clients: int, devices: int = 1, variables: Mapping[str, str] | None = None
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Merges the first updates of a folder with the default method, in a new process.

    Args:
        folder: holds the updates, and receives the results.
        clients: number of updates to merge.
        devices: number of processes to merge with.
        variables: environment variables of the process, beside those of this one.

    Returns:
        Time and memory (see `main`), and the merged weights.

    Raises:
        RuntimeError: if the process failed, with the end of what it printed.
    """
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(folder), str(clients), str(devices)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **(variables or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the merge of {clients} updates failed:\n{done.stderr[-3000:]}")
    report, merged = _results(folder, clients, devices)
    return json.loads(report.read_text()), load_file(merged)


class _FitClock(Callback):
    """Notes when the fit begins: all processes have started and opened the updates."""

    began = 0.0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = time.perf_counter()


def main() -> None:
    """Merges as the command line says (folder, number of updates, number of devices).

    Writes a JSON file with the numbers of rank 0: ``seconds`` from the files to the model (with
    several devices, the start of the further processes included), ``fit_seconds`` of them after the
    updates were opened, ``cpu_seconds`` of the process, resident memory before the merge and at its
    peak, and the iterations and residual of the last epoch.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    folder, clients, devices = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    updates = sorted(folder.glob("client-*.safetensors"))[:clients]
    clock = _FitClock()
    options: dict[str, Any] = {**QUIET, "devices": devices, "callbacks": [clock]}
    if devices > 1:
        options["strategy"] = "ddp"
    before = status_bytes("VmRSS")
    started, worked = time.perf_counter(), time.process_time()
    result = merge("fedfisher", updates, None, None, options)
    took = {
        "clients": len(updates),
        "seconds": result.seconds,
        "fit_seconds": started + result.seconds - clock.began,
        "cpu_seconds": time.process_time() - worked,
        "before_bytes": before,
        "peak_bytes": status_bytes("VmHWM"),
        "iterations": result.history[-1]["iterations"],
        "residual": result.history[-1]["residual"],
    }
    if rank_zero_only.rank == 0:
        report, merged = _results(folder, clients, devices)
        save_file(result.state_dict, merged)
        report.write_text(json.dumps(took))


def _results(folder: Path, clients: int, devices: int) -> tuple[Path, Path]:
    """The files of the numbers and of the merged weights."""
    report = folder / f"merged-{clients}-by-{devices}.json"
    return report, report.with_suffix(".safetensors")


if __name__ == "__main__":
    main()
