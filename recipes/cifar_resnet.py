"""One-shot federated learning, simulated end to end on one machine.

Splits a data set over clients, trains each alone with FedFisherCallback on its Trainer, merges the
update files with every chosen method, and compares the merged models with each other, with the best
single client and with the ensemble of all clients.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from simulation.data import load_images
from simulation.federation import ClientResult, MergeResult, ensemble, score
from simulation.flags import Flags, parse_flags, settle
from simulation.pictures import draw_accuracies, draw_merge_curves, draw_partition
from simulation.round import Round, is_first_process, say, seeded_network
from simulation.start import read_start
from torch import Tensor

from lightning_fedfisher import ClientUpdate


def report(
    current: Round,
    clients: Sequence[ClientResult],
    predictions: Sequence[Tensor],
    merged: Mapping[str, tuple[MergeResult, float, float]],
) -> dict[str, Any]:
    """Puts all numbers together, in the form of ``results.json``.

    Args:
        current: the round.
        clients: result of each client.
        predictions: log-probabilities of each client's model on the test set.
        merged: from `Round.merge_all`.

    Returns:
        The report; accuracies in percent, sizes in bytes a client, times in seconds.
    """
    ensemble_accuracy, ensemble_nll = score(ensemble(predictions), current.images.test.labels)
    methods = {}
    for method, (result, accuracy, nll) in merged.items():
        files = [folder.update(method) for folder in current.folders]
        seconds = [client.extraction_seconds[files[0].name] for client in clients]
        methods[method] = {
            "accuracy": accuracy,
            "nll": nll,
            "upload_bytes": round(sum(file.stat().st_size for file in files) / len(files)),
            "fedavg_bytes": ClientUpdate.open(files[0]).fedavg_bytes,
            "client_seconds": sum(seconds) / len(seconds),
            "server_seconds": result.seconds,
            "server_labels": result.labels,
        }
    return {
        "config": current.flags.plain(),
        "data": current.images.note,
        "environment": environment(current.device),
        "clients": [{"num_samples": c.num_samples, "accuracy": c.accuracy} for c in clients],
        "best_client": {"accuracy": max(client.accuracy for client in clients)},
        "ensemble": {"accuracy": ensemble_accuracy, "nll": ensemble_nll},
        "methods": methods,
    }


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
    current: Round,
    results: Mapping[str, Any],
    merged: Mapping[str, tuple[MergeResult, float, float]],
) -> list[Path]:
    """Writes the report, the merged model and the pictures.

    Args:
        current: the round.
        results: from `report`.
        merged: from `Round.merge_all`.

    Returns:
        What was written.
    """
    output = current.output
    headline = "fedfisher" if "fedfisher" in merged else list(merged)[-1]
    save_file(merged[headline][0].state_dict, output / "merged.safetensors")
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return [
        output / "results.json",
        output / "merged.safetensors",
        current.folders[0].updates.parent,
        draw_partition(current.histogram, output / "partition.png"),
        draw_accuracies(results, output / "accuracy.png"),
        draw_merge_curves(
            {method: result.history for method, (result, _, _) in merged.items()},
            output / "merge.png",
        ),
    ]


def show(results: Mapping[str, Any], console: Console) -> None:
    """Prints the comparison table.

    Args:
        results: from `report`.
        console: where to.
    """
    table = Table(title="Test accuracy of one-shot models")
    table.add_column("model", no_wrap=True)
    for column in ("accuracy", "NLL", "upload", "client", "server", "labels"):
        table.add_column(column, justify="right", no_wrap=True)
    best, together = results["best_client"], results["ensemble"]
    table.add_row("best single client", f"{best['accuracy']:.2f}", *[""] * 5)
    table.add_row("ensemble of clients", f"{together['accuracy']:.2f}", f"{together['nll']:.3f}")
    table.add_section()
    for method, row in results["methods"].items():
        table.add_row(
            method,
            f"{row['accuracy']:.2f}",
            f"{row['nll']:.3f}",
            f"{row['upload_bytes'] / row['fedavg_bytes']:.2f}x",
            f"{row['client_seconds']:.1f} s",
            f"{row['server_seconds']:.1f} s",
            str(row["server_labels"]),
        )
    console.print(table)
    console.print(
        "accuracy in percent; upload: bytes a client sends, in multiples of its weights;\n"
        "client: extraction; server: merge; labels: labelled samples the server used",
        highlight=False,
    )


def run(flags: Flags) -> dict[str, Any]:
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
    for name in ("clients", "epochs", "max_train_samples", "batch_size", "curvature_samples"):
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
    start = None
    if flags.init is not None:
        start = read_start(flags.init, seeded_network(flags, images), flags.new_head)
        head = ", with a new last layer" if flags.new_head else ""
        say(f"all clients start from {flags.init}{head}")
    current = Round(flags, images, start)
    clients, predictions = current.fit_clients()
    merged = current.merge_all()
    results = report(current, clients, predictions, merged)
    if is_first_process():
        written = write(current, results, merged)
        console = Console()
        show(results, console)
        console.print("written:")
        for path in written:
            console.print(f"  {path}", soft_wrap=True, highlight=False)
    return results


def main() -> None:
    """Runs the recipe from the command line."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
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
