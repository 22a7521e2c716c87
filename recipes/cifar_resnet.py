"""One-shot federated learning, simulated end to end on one machine.

Splits a data set over clients, trains each alone with FedFisherCallback on its Trainer, merges the
update files with every chosen method, and compares the merged models with each other, with the best
single client and with the ensemble of all clients. Further rounds start from the merged model.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_only
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from simulation.clients import ClientResult
from simulation.data import load_images
from simulation.flags import Flags, parse_flags, settle
from simulation.initial_weights import read_start, without_prefix
from simulation.record import record
from simulation.round import (
    Merged,
    Round,
    headline,
    is_first_process,
    round_folder,
    say,
    seeded_network,
)
from torch import Tensor

from lightning_fedfisher import ClientUpdate
from lightning_fedfisher._utils.files import atomic_write
from lightning_fedfisher.report.page import write_report
from lightning_fedfisher.results.record import FederationRecord, ModelScore
from lightning_fedfisher.tracking import log_federation, log_merged_model

Report = dict[str, Any]

_WRITTEN = (
    *("report.html", "merged.safetensors", "updates"),
    *("results.json", "record.json"),
)


def results_of(current: Round, clients: Sequence[ClientResult], record: FederationRecord) -> Report:
    """The numbers of a round, in the form of ``results.json``.

    Args:
        current: the round.
        clients: result of each client.
        record: of the round.

    Returns:
        The report; accuracies in percent, sizes in bytes a client, times in seconds.
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


def _numbers(score: ModelScore | None) -> dict[str, float]:
    assert score is not None
    numbers = asdict(score)
    del numbers["confusion"]
    return numbers


def environment(device: torch.device) -> dict[str, str]:
    """What the times depend on: date, versions and hardware."""
    processor = f"{os.cpu_count()} cores, {platform.machine()}"
    return {
        "date": f"{datetime.now():%Y-%m-%d}",
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else processor,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }


def write(
    current: Round, results: Report, record: FederationRecord, state: Mapping[str, Tensor]
) -> None:
    """Writes model, record, page and, as what marks the round as finished, the numbers.

    Args:
        current: the round.
        results: from `results_of`.
        record: of the round.
        state: of the merged model.
    """
    current.report_file.unlink(missing_ok=True)  # of another model than the one to be written
    save_file(dict(state), current.model_file)
    record.save(current.output / "record.json")
    write_report(record, current.output / "report.html")
    write_results(current.report_file, results)


def write_results(path: Path, results: Report) -> None:
    """Writes numbers; a reader sees the old file or the whole new one.

    Args:
        path: of the JSON file.
        results: from `results_of` or `whole_report`.
    """
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(results, indent=2) + "\n")


def whole_report(flags: Flags, reports: Sequence[Report]) -> Report:
    """Puts the rounds of a run together.

    Args:
        flags: settled flags.
        reports: of the rounds that are finished.

    Returns:
        The first round's report and, of a run of several rounds, how each of them went.
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


def show(results: Report, console: Console, title: str) -> None:
    """Prints the comparison table.

    Args:
        results: from `results_of`.
        console: where to.
        title: of the table.
    """
    # The columns fit into 80 characters.
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("model", no_wrap=True)
    for column in ("accuracy", "NLL", "ECE", "upload", "client", "server", "labels"):
        table.add_column(column, justify="right", no_wrap=True)
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
    # Rounds that were finished before calibration was measured tell nothing of it.
    off = row.get("calibration_error")
    nll = f"{row['nll']:.3f}" if "nll" in row else ""
    return [f"{row['accuracy']:.2f}", nll, "" if off is None else f"{off:.1f}"]


def run(flags: Flags) -> Report:
    """Runs the whole recipe.

    Args:
        flags: from `parse_flags`.

    Returns:
        The report, as written to ``results.json``.
    """
    if flags.resume and flags.output_dir is None:
        raise ValueError("--resume goes on in a folder: add --output-dir")
    if flags.new_head and flags.init is None:
        raise ValueError("--new-head leaves out a part of given weights: add --init")
    counts = ("clients", "rounds", "epochs", "max_train_samples", "batch_size", "curvature_samples")
    for name in counts:
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    images = load_images(flags.dataset, flags.data_dir)
    flags = settle(flags, images)
    say(f"data: {images.note}")
    subset = f"{flags.max_train_samples or len(images.train)} of {len(images.train)}"
    say(
        f"{flags.clients} clients share {subset} training samples of {flags.dataset} "
        f"(alpha {flags.alpha:g}, partition seed {flags.partition_seed}); model {flags.model}"
    )
    _refuse_finished_clients(flags)
    start = None
    if flags.init is not None:
        start = read_start(flags.init, seeded_network(flags, images), flags.new_head)
        head = ", with a new last layer" if flags.new_head else ""
        say(f"all clients start from {flags.init}{head}")
    several = flags.rounds > 1
    reports: list[Report] = []
    for number in range(1, flags.rounds + 1):
        current = Round(flags, images, number, start)
        finished = current.finished() if flags.resume and several else None
        if several:
            source = f", from the model of {headline(flags.methods)}" if number > 1 else ""
            kept = " (kept)" if finished else ""
            say(f"round {number} of {flags.rounds}{source}{kept}")
        results, start = finished or play(current)
        reports.append(results)
        if is_first_process():
            if several:
                write_results(round_folder(flags, 1) / "results.json", whole_report(flags, reports))
            after = f"after round {number} of {flags.rounds}" if several else "of one-shot models"
            show(results, Console(), f"Test accuracy {after}")
    say(
        "accuracy and calibration error (ECE) in percent; upload: bytes a client sends, in\n"
        "multiples of its weights; client: extraction; server: merge; labels: labelled samples\n"
        "the server used\n"
        "written:"
    )
    later = [round_folder(flags, number) for number in range(2, flags.rounds + 1)]
    for path in (*(round_folder(flags, 1) / name for name in _WRITTEN), *later):
        say(f"  {path}")
    return whole_report(flags, reports)


def play(current: Round) -> tuple[Report, dict[str, Tensor]]:
    """Fits, merges, compares and writes one round.

    Args:
        current: the round.

    Returns:
        The report, and the weights that go on.
    """
    clients, predictions = current.fit_clients()
    methods = current.flags.methods
    main_method = headline(methods)
    merged: dict[str, Merged] = {}
    # The one that matters comes last: its run shows the others beside it.
    for method in sorted(methods, key=lambda method: method == main_method):
        with current.server_logger(method) as logger:
            merged[method] = current.merge(method, logger)
            if method == main_method:
                where = environment(current.device)
                told = record(current, clients, predictions, merged, main_method, where)
                results = results_of(current, clients, told)
                state = merged[method].result.state_dict
                _publish(current, results, told, state, logger)
    return results, without_prefix(state)


@rank_zero_only
def _publish(
    current: Round,
    results: Report,
    record: FederationRecord,
    state: Mapping[str, Tensor],
    logger: WandbLogger | None,
) -> None:
    write(current, results, record, state)
    if logger:
        method = record.merges[0].method
        updates = [ClientUpdate.open(folder.update(method)) for folder in current.folders]
        log_federation(logger, record)
        log_merged_model(logger, current.model_file, updates)


def _refuse_finished_clients(flags: Flags) -> None:
    """Looks at all rounds at once, lest a later one be refused after hours."""
    for number in range(1, flags.rounds + 1):
        folder = round_folder(flags, number)
        if not flags.resume and is_first_process() and (folder / "clients").exists():
            raise ValueError(
                f"{folder} already holds finished clients: add --resume to keep them, or "
                "choose another --output-dir"
            )


def main() -> None:
    """Runs the recipe from the command line."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*treespec.*", module="lightning")
    warnings.filterwarnings("ignore", ".*have no `val_dataloader`.*")
    os.environ.setdefault("WANDB_SILENT", "true")
    flags = parse_flags(description=__doc__)
    try:
        run(flags)
    except (OSError, ValueError, MisconfigurationException) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
