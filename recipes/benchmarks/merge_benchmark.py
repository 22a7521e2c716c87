"""Measures what the server costs, in five ways (`--what`).

- speed: merges the same five trained clients with the default method and as published.
- clients: time and memory of the default merge for a quarter, half and all of many LeNet updates.
- resnet18: the same for the paper's ResNet18, of which one update takes 420 MB.
- processes: the default merge of the CNN's updates by one process and by two.
- upload: compresses, opens and reads one update of ResNet18.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table
from simulation.clients import (
    EXTRACTIONS,
    QUIET,
    Classifier,
    labelled_samples,
    merge,
    predict,
)
from simulation.data import ImageData, collate_images, load_images
from simulation.federations import Federation, benchmark_federation
from simulation.json_report import write_benchmark_report
from simulation.merge_subprocess import measure_merge
from simulation.models import build_model
from simulation.scores import score
from simulation.study import fit_federation
from simulation.synthetic import synthetic_update, write_perturbed
from simulation.tables.benchmarks import merge_benchmark_rows
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_fedfisher import ClientUpdate, extract_curvature

What = Literal["speed", "clients", "resnet18", "processes", "upload"]

_MODELS = {
    "speed": "lenet",
    "clients": "lenet",
    "resnet18": "resnet18",
    "processes": "cnn",
    "upload": "resnet18",
}
_CLIENTS = {"speed": 5, "clients": 1000, "resnet18": 20, "processes": 5, "upload": 1}
_REPEATS = {"speed": 5, "clients": 3, "resnet18": 1, "processes": 3, "upload": 1}
_BUDGETS = {"as it is": None, "budget 1": 1.0, "budget 0.3": 0.3}
_BATCH = 250
_PUBLISHED = "fedfisher_kfac"


def trained_updates(
    federation: Federation, method: str, images: ImageData, clients_dir: Path, folder: Path
) -> list[Path]:
    """Extracts the updates of trained clients, those that are not there yet.

    Args:
        federation: what the clients were trained as.
        method: merge method that the updates serve.
        images: the data set.
        clients_dir: folder of the curvature study, which holds the trained clients.
        folder: where the update files go.

    Returns:
        The update files, one for each client.
    """
    kind, fisher = EXTRACTIONS[method]
    paths = []
    for index, (network, samples) in enumerate(
        fit_federation(federation, images, clients_dir / federation.name)
    ):
        paths.append(folder / federation.name / method / f"client-{index:04d}.safetensors")
        if paths[-1].is_file():
            continue
        loader = DataLoader(
            samples.without_augmentation(), batch_size=_BATCH, collate_fn=collate_images
        )
        model = Classifier(network, 0.0)
        extracted = extract_curvature(
            model,
            loader,
            cast(Any, kind),
            fisher=cast(Any, fisher),
            # As the callback does by itself, and as published.
            max_samples=None if method == _PUBLISHED else "auto",
            progress=False,
        )
        update = ClientUpdate.from_model(model, extracted.header(), extracted.blocks)
        update.save(paths[-1])
    return paths


def untrained(model: str) -> Classifier:
    """Builds an untrained classifier of the paper.

    Args:
        model: name of its network.

    Returns:
        The classifier, with the same weights at every call.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_model(model, *_image(model), 10)
    return Classifier(network, 0.0)


def _image(model: str) -> tuple[int, int]:
    """Channels and height of the images that a network of the paper takes."""
    return (1, 28) if model == "lenet" else (3, 32)


def speed(flags: Any) -> dict[str, Any]:
    """Times the default method, and the published server with and without its labels.

    Args:
        flags: of the command line.

    Returns:
        The report: seconds, accuracies in percent of the test set, and labels used.
    """
    federation = benchmark_federation(flags.model)
    images = load_images(federation.dataset, flags.data_dir)
    labelled = labelled_samples(images.train, federation.seed)
    rows = {}
    for name, method, seen, repeats in (
        ("fedfisher", "fedfisher", None, flags.repeats),
        ("fedfisher_kfac", _PUBLISHED, labelled, 1),
        ("fedfisher_kfac, without a look at labels", _PUBLISHED, None, 1),
    ):
        files = trained_updates(federation, method, images, flags.clients_dir, flags.output_dir)
        seconds = []
        for _ in range(repeats):
            network = build_model(federation.model, *images.train.images.shape[1:3], images.classes)
            classifier = Classifier(network, 0.0)
            result = merge(method, files, classifier, seen, QUIET)
            seconds.append(result.seconds)
        predicted = predict(classifier, images.test, torch.device("cpu"))
        rows[name] = {
            "seconds": statistics.median(seconds),
            "every_seconds": seconds,
            "accuracy": score(predicted, images.test.labels)[0],
            "labels": result.labels,
        }
        print(name, rows[name], flush=True)
    return {
        "rows": rows,
        "times_faster": rows["fedfisher_kfac"]["seconds"] / rows["fedfisher"]["seconds"],
    }


def clients(flags: Any) -> dict[str, Any]:
    """Measures the default merge of different numbers of updates, each in its own process.

    Args:
        flags: of the command line.

    Returns:
        The report; its ratios compare each row with the row before.
    """
    folder = flags.output_dir / f"{flags.what}-{flags.model}"
    divisors = (4, 2, 1) if flags.what == "clients" else (1,)
    counts = sorted({max(flags.clients // divisor, 1) for divisor in divisors})
    try:
        _write(flags, folder, trained=flags.what == "clients")
        rows = {}
        for count in counts:
            rows[str(count)], _ = _median(folder, count, flags.repeats)
            print(rows[str(count)], flush=True)
    finally:
        # At 420 MB each they are not left behind unasked.
        if flags.what == "resnet18" and not flags.keep:
            shutil.rmtree(folder, ignore_errors=True)

    def ratios(field: str) -> list[float]:
        return [b[field] / a[field] for a, b in itertools.pairwise(rows.values())]

    return {
        "rows": rows,
        "clients_ratios": ratios("clients"),
        "seconds_ratios": ratios("seconds"),
        "cpu_seconds_ratios": ratios("cpu_seconds"),
        "peak_ratios": ratios("peak_bytes"),
    }


def processes(flags: Any) -> dict[str, Any]:
    """Measures the default merge by one process and by two, with one thread each.

    Args:
        flags: of the command line.

    Returns:
        The report, with the largest relative difference (Frobenius norm) of any merged tensor.
    """
    folder = flags.output_dir / f"processes-{flags.model}"
    if flags.clients_dir is None:
        _write(flags, folder, trained=False)
    else:
        federation = benchmark_federation(flags.model)
        images = load_images(federation.dataset, flags.data_dir)
        files = trained_updates(
            federation, "fedfisher", images, flags.clients_dir, flags.output_dir
        )
        folder = files[0].parent
    rows, merged = {}, []
    for count in (1, 2):
        rows[str(count)], weights = _median(
            folder, flags.clients, flags.repeats, devices=count, variables={"OMP_NUM_THREADS": "1"}
        )
        merged.append(weights)
        print(rows[str(count)], flush=True)
    alone, together = merged
    return {
        "updates": "made up" if flags.clients_dir is None else "trained",
        "rows": rows,
        "times_faster": rows["1"]["fit_seconds"] / rows["2"]["fit_seconds"],
        "relative_difference": max(
            float((together[name] - weight).norm() / weight.norm())
            for name, weight in alone.items()
        ),
    }


def upload(flags: Any) -> dict[str, Any]:
    """Measures what it takes to compress, verify and read an update with made-up factors.

    Args:
        flags: of the command line.

    Returns:
        The report; sizes in multiples of the weights.
    """
    channels, size = _image(flags.model)
    update = synthetic_update(untrained(flags.model), torch.rand(2, channels, size, size))
    path = flags.output_dir / "upload.safetensors"
    rows = {}
    for name, budget in _BUDGETS.items():
        started = time.perf_counter()
        (update if budget is None else update.compressed(budget)).save(path)
        written = time.perf_counter()
        opened = ClientUpdate.open(path)
        opened.verify()
        verified = time.perf_counter()
        for layer in opened.layers:
            opened.weights(layer), opened.block(layer)
        rows[name] = {
            "uploads": path.stat().st_size / update.fedavg_bytes,
            "packing_seconds": written - started,
            "verifying_seconds": verified - written,
            "reading_seconds": time.perf_counter() - verified,
        }
        print(name, rows[name], flush=True)
    path.unlink()
    return {"rows": rows}


def _median(
    folder: Path, clients: int, repeats: int, **options: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Repeats a merge, and gives the run of median time with the times of all."""
    runs = [measure_merge(folder, clients, **options) for _ in range(repeats)]
    times = [took["fit_seconds"] for took, _ in runs]
    took, merged = runs[times.index(statistics.median_low(times))]
    return {**took, "every_fit_seconds": times}, merged


def _write(flags: Any, folder: Path, trained: bool) -> None:
    """Writes perturbed copies of one trained client's update, or of a synthetic one."""

    def first() -> ClientUpdate:
        if not trained:
            channels, size = _image(flags.model)
            return synthetic_update(untrained(flags.model), torch.rand(2, channels, size, size))
        federation = benchmark_federation(flags.model)
        images = load_images(federation.dataset, flags.data_dir)
        files = trained_updates(
            federation, "fedfisher", images, flags.clients_dir, flags.output_dir
        )
        return ClientUpdate.open(files[0])

    write_perturbed(first, folder, flags.clients)


def show(report: dict[str, Any], console: Console) -> None:
    """Prints the table of a report.

    Args:
        report: from `write_benchmark_report`.
        console: where to print.
    """
    header, *rows = merge_benchmark_rows(report)
    table = Table(title=f"{report['config']['what']}, {report['config']['model']}")
    for column, name in enumerate(header):
        table.add_column(name, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def make_parser() -> ArgumentParser:
    """Describes the command line.

    Returns:
        The parser.
    """
    parser = ArgumentParser(prog="merge_benchmark.py", description=__doc__)
    parser.add_argument("--what", type=What, default="speed", help="what to measure")
    parser.add_argument("--model", type=str, default=None, help="lenet, cnn or resnet18")
    parser.add_argument(
        "--clients", type=int, default=None, help="number of updates; by default what suits --what"
    )
    parser.add_argument(
        "--repeats", type=int, default=None, help="runs, of which the median counts"
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder of images")
    parser.add_argument(
        "--clients-dir",
        type=Path,
        default=None,
        help="folder of the curvature study's trained clients; without it `processes` merges "
        "synthetic updates",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("runs/merge_benchmark"),
        help="folder for update files",
    )
    parser.add_argument("--keep", action="store_true", help="keep the update files of resnet18")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line.

    Args:
        arguments: of the command line; None reads `sys.argv`.
    """
    flags = make_parser().parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    flags.model = flags.model or _MODELS[flags.what]
    flags.clients = flags.clients or _CLIENTS[flags.what]
    flags.repeats = flags.repeats or _REPEATS[flags.what]
    if flags.clients_dir is None and flags.what not in ("processes", "upload"):
        flags.clients_dir = Path("runs/curvature_study")
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    run = {
        "speed": speed,
        "clients": clients,
        "resnet18": clients,
        "processes": processes,
        "upload": upload,
    }
    try:
        report = run[flags.what](flags)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    config = {name: flags[name] for name in ("what", "model", "clients", "repeats")}
    show(write_benchmark_report(report, config, flags.output), Console())


if __name__ == "__main__":
    main()
