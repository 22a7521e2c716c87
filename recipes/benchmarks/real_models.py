"""Measures what a client and the server cost on real networks, in units of their own training.

Each number is taken in a process of its own, on one thread, in the processor's time; networks have
random weights and random data. Networks and libraries that are not installed are skipped, by name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse import ArgumentParser
from simulation.environment import environment
from simulation.json_report import write_benchmark_report, write_json
from simulation.model_costs import Setting, measure
from simulation.model_peers import PEERS
from simulation.real_models import REAL_MODELS
from simulation.tables.benchmarks import real_models_table

_METHODS = ("fedavg", "fedfisher")


def costs(setting: Setting, peers: bool, merge: bool, minutes: float) -> dict[str, Any]:
    """Measures one network.

    Args:
        setting: of the measurements.
        peers: whether to measure other libraries.
        merge: whether to measure merges.
        minutes: that one measurement may take.

    Returns:
        The row of the report: what was measured, or ``failed`` and the reason.
    """
    with TemporaryDirectory() as name:

        def run(what: str, chosen: Setting = setting) -> dict[str, Any]:
            took = measure(what, chosen, Path(name), minutes)
            print(f"{setting.model}, {what}: {took}", flush=True)
            return took

        row = run("client")
        if "failed" in row:
            return row
        own = row["training_seconds"]
        extraction = row["rehearsal_seconds"] + row["extraction_seconds"]
        packing = row["rehearsal_packing_seconds"] + row["packing_seconds"]
        row["times_training"] = extraction / row["curvature_samples"] / own
        row["epochs"] = (extraction + packing) / (setting.samples * own)
        row["packing_epochs"] = packing / (setting.samples * own)
        row["training"] = run("training")
        if peers:
            same = replace(setting, samples=row["curvature_samples"])
            row["peers"] = {peer: run(peer, same) for peer in PEERS}
            for took in row["peers"].values():
                if "failed" not in took:
                    a_sample = took["seconds"] / same.samples
                    took["times_training"] = a_sample / took["training_seconds"]
        if merge:
            row["merge"] = {"updates": run("updates")}
            if "failed" not in row["merge"]["updates"]:
                row["merge"] |= {method: run(method) for method in _METHODS}
        return row


def make_parser() -> ArgumentParser:
    """Describes the command line.

    Returns:
        The parser.
    """
    parser = ArgumentParser(prog="real_models.py", description=__doc__)
    parser.add_argument(
        "--models", type=str, default=",".join(REAL_MODELS), help="names, with commas between them"
    )
    parser.add_argument("--samples", type=int, default=3600, help="samples of the client")
    parser.add_argument("--batch-size", type=int, default=32, help="samples in a batch")
    parser.add_argument("--peers", type=bool, default=True, help="whether to measure other K-FACs")
    parser.add_argument("--merge", type=bool, default=True, help="whether to measure merges")
    parser.add_argument(
        "--minutes", type=float, default=60, help="that one measurement may take at most"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        help="JSON file, written after each network; what else it holds of networks is kept",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line.

    Args:
        arguments: of the command line; None reads `sys.argv`.
    """
    flags = make_parser().parse_args(arguments)
    names = flags.models.split(",")
    if unknown := [name for name in names if name not in REAL_MODELS]:
        sys.exit(
            f"error: unknown models {', '.join(unknown)}: choose from {', '.join(REAL_MODELS)}"
        )
    config = {name: flags[name] for name in ("samples", "batch_size")}
    rows: dict[str, Any] = {}
    if flags.output is not None and flags.output.is_file():
        before = json.loads(flags.output.read_text())
        if before["config"] != config:
            sys.exit(f"error: {flags.output} was measured with {before['config']}")
        rows = before["networks"]
    for name in names:
        setting = Setting(name, flags.samples, flags.batch_size)
        took = costs(setting, flags.peers, flags.merge, flags.minutes)
        rows[name] = took if "failed" in took else rows.get(name, {}) | took
        if flags.output is not None:
            about = environment(torch.device("cpu"))
            write_json(flags.output, {"networks": rows, "config": config, "environment": about})
    report = write_benchmark_report({"networks": rows}, config, flags.output)
    print(real_models_table(report))


if __name__ == "__main__":
    main()
