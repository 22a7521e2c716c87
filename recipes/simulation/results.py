"""The results of a round: as a JSON file, as a table and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from lightning_fedfisher.report.page import write_report
from lightning_fedfisher.results.record import FederationRecord, ModelScore
from simulation.clients import ClientResult
from simulation.flags import Flags
from simulation.json_report import write_json
from simulation.round import Round

Report: TypeAlias = dict[str, Any]
"""The content of a ``results.json``."""


def results_of(current: Round, clients: Sequence[ClientResult], record: FederationRecord) -> Report:
    """Gathers the numbers of a round for its ``results.json``.

    Args:
        current: the round.
        clients: the result of each client.
        record: the record of the round.

    Returns:
        The numbers: accuracies in percent, sizes in bytes for each client, times in seconds.
    """
    assert record.best_client is not None
    assert record.ensemble is not None
    merges = {merge.method: merge for merge in record.merges}
    methods = {}
    for method in current.flags.methods:
        merge = merges[method]
        methods[method] = {
            **_numbers(merge.score),
            "upload_bytes": merge.upload_bytes,
            "fedavg_bytes": merge.fedavg_bytes,
            "client_seconds": merge.client_seconds,
            "server_seconds": merge.server_seconds,
            "server_labels": merge.server_labels,
        }
    return {
        "config": record.config,
        "data": current.images.note,
        "environment": record.environment,
        "clients": [{"num_samples": c.num_samples, "accuracy": c.accuracy} for c in clients],
        "best_client": _numbers(record.best_client),
        "ensemble": _numbers(record.ensemble),
        "methods": methods,
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
    current: Round, results: Report, record: FederationRecord, state: Mapping[str, Tensor]
) -> None:
    """Writes model, record and page, and last the numbers, which mark the round as finished.

    Args:
        current: the round.
        results: from `results_of`.
        record: the record of the round.
        state: state dict of the merged model.
    """
    current.report_file.unlink(missing_ok=True)  # it belongs to a model that is replaced now
    save_file(dict(state), current.model_file)
    record.save(current.output / "record.json")
    write_report(record, current.output / "report.html")
    write_json(current.report_file, results)


def show(results: Report, console: Console, title: str) -> None:
    """Prints the table that compares clients, ensemble and merged models.

    Args:
        results: from `results_of`.
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
    """The scores of a model, without its confusion matrix."""
    assert score is not None
    numbers = asdict(score)
    del numbers["confusion"]
    return numbers
