"""The results of a round: as a JSON file, as a table and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from lightning_fedfisher.report.page import write_report
from lightning_fedfisher.results.record import FederationRecord, MergeRecord, ModelScore
from simulation.flags import Flags
from simulation.json_report import write_json

Report: TypeAlias = dict[str, Any]
"""The content of a ``results.json``."""


def report_of(record: FederationRecord, methods: Sequence[str], note: str) -> Report:
    """Gathers the numbers of a federation for its ``results.json``.

    Args:
        record: the record of the federation.
        methods: the merge methods, in the order to report them.
        note: where the data comes from.

    Returns:
        The numbers: accuracies in percent, sizes in bytes for each client, times in seconds. What
        was not tested has no scores.
    """
    merges = {merge.method: merge for merge in record.merges}
    return {
        "config": record.config,
        "data": note,
        "environment": record.environment,
        "clients": [
            {
                "num_samples": client.num_samples,
                "accuracy": client.score.accuracy if client.score else None,
            }
            for client in record.clients
        ],
        "best_client": _numbers(record.best_client),
        "ensemble": _numbers(record.ensemble),
        "methods": {method: _costs_and_scores(merges[method]) for method in methods},
    }


def _costs_and_scores(merge: MergeRecord) -> dict[str, float | None]:
    """The numbers of one merge."""
    return {
        **_numbers(merge.score),
        "upload_bytes": merge.upload_bytes,
        "fedavg_bytes": merge.fedavg_bytes,
        "client_seconds": merge.client_seconds or 0.0,
        "server_seconds": merge.server_seconds,
        "server_labels": merge.server_labels,
        "unlabelled_samples": merge.unlabelled_samples,
    }


def whole_report(flags: Flags, reports: Sequence[Report]) -> Report:
    """Puts the numbers of all rounds together.

    Args:
        flags: from `settle`.
        reports: of the rounds that are finished, in their order.

    Returns:
        The report of the first round; of several rounds, with a list ``rounds`` of their scores.
    """
    if flags.rounds == 1:
        return dict(reports[0])
    rounds = [
        {
            "round": number,
            "best_client": each["best_client"],
            "ensemble": each["ensemble"],
            "methods": {
                method: {"accuracy": row["accuracy"], "nll": row["nll"]}
                for method, row in each["methods"].items()
            },
        }
        for number, each in enumerate(reports, start=1)
    ]
    # A first round that was kept may be that of a shorter run.
    return {**reports[0], "config": flags.plain(), "rounds": rounds}


def write(
    output: Path, results: Report, record: FederationRecord, state: Mapping[str, Tensor]
) -> None:
    """Writes model, record and page, and last the numbers, which mark a round as finished.

    Args:
        output: folder of the round.
        results: from `report_of`.
        record: the record of the round.
        state: state dict of the merged model.
    """
    report_file = output / "results.json"
    report_file.unlink(missing_ok=True)  # it belongs to a model that is replaced now
    save_file(dict(state), output / "merged.safetensors")
    record.save(output / "record.json")
    write_report(record, output / "report.html")
    write_json(report_file, results)


def show(results: Report, console: Console, title: str) -> None:
    """Prints the table that compares clients, ensemble and merged models.

    Args:
        results: from `report_of`.
        console: where to print.
        title: of the table.
    """
    # The columns fit into 80 characters.
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("model", no_wrap=True)
    for column in ("accuracy", "NLL", "ECE", "upload", "client", "server", "labels"):
        table.add_column(column, justify="right", no_wrap=True)
    if results["best_client"]:  # clients that fit a head alone have no model of their own
        table.add_row("best single client", *_scores(results["best_client"]))
        table.add_row("ensemble of clients", *_scores(results["ensemble"]))
        table.add_section()
    for method, row in results["methods"].items():
        table.add_row(
            method,
            *_scores(row),
            f"{row['upload_bytes'] / row['fedavg_bytes']:.2f}x",
            f"{row['client_seconds']:.1f} s",
            f"{row['server_seconds']:.1f} s",
            str(row["server_labels"]),
        )
    console.print(table)


def _scores(row: Mapping[str, float]) -> list[str]:
    """Accuracy, likelihood and calibration of a model as text."""
    # Rounds that were finished before calibration was measured lack it.
    off = row.get("calibration_error")
    nll = f"{row['nll']:.3f}" if "nll" in row else ""
    return [f"{row['accuracy']:.2f}", nll, "" if off is None else f"{off:.1f}"]


def _numbers(score: ModelScore | None) -> dict[str, float]:
    """The scores of a model, without its confusion matrix; empty if it was not tested."""
    if score is None:
        return {}
    numbers = asdict(score)
    del numbers["confusion"]
    return numbers
