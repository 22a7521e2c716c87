"""Checks that a GPU gives the same curvature and merged model as the CPU, and how fast.

Runs the callback, the extraction and a merge of three clients on the CPU and on the GPU, for LeNet
and a small ResNet with random data. ResNet50, ViT-B/16 and GPT-2, with random weights and data, are
compared by an extraction from few samples, and then timed on the GPU alone. Without a GPU it says
so, leaves the large networks out, and compares the CPU with itself.
"""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse import ArgumentParser
from simulation.device_costs import STEPS, DeviceCosts, exact_convolutions
from simulation.device_steps import CPU, DeviceSteps, relative_difference
from simulation.json_report import write_benchmark_report
from simulation.models import MODELS
from simulation.real_models import LARGE_MODELS
from simulation.tables.benchmarks import gpu_table
from simulation.timing import timed

_SMALL = ("lenet", "resnet8")


def check(model: str, flags: Namespace, device: torch.device) -> list[dict[str, str | float]]:
    """Times and compares every step for one small network.

    Args:
        model: name of the network.
        flags: of the command line.
        device: to compare with the CPU.

    Returns:
        A row for each step: seconds on both devices and the relative difference.
    """
    rows: list[dict[str, str | float]] = []
    with TemporaryDirectory() as folder, exact_convolutions():
        steps = DeviceSteps(model, flags.samples, flags.batch_size, Path(folder))
        for name in ("callback", "extraction", "merge"):
            step = getattr(steps, name)
            expected, cpu_seconds = timed(partial(step, CPU), flags.repeats)
            found, seconds = timed(partial(step, device), flags.repeats, device)
            rows.append(
                {
                    "model": model,
                    "step": name,
                    "cpu_seconds": cpu_seconds,
                    "device_seconds": seconds,
                    "relative_difference": relative_difference(expected, found),
                }
            )
    return rows


def check_large(model: str, flags: Namespace, device: torch.device) -> dict[str, Any]:
    """Compares one large network on few samples, and times it on the device.

    Args:
        model: name of the network.
        flags: of the command line.
        device: to compare with the CPU and to time.

    Returns:
        The row of the report: what was measured, and ``failed`` with the reason if a step failed or
        ``missing`` if the network's package is not installed.
    """
    row: dict[str, Any] = {"model": model}
    try:
        costs = DeviceCosts(
            LARGE_MODELS[model], flags.large_samples, flags.large_batch_size, device
        )
        for step in STEPS:
            took = getattr(costs, step)()
            print(f"{model}, {step}: {took}", flush=True)
            row |= took
    except ImportError as error:
        row["missing"] = str(error)
        print(f"{model} is left out: {error}", flush=True)
    except Exception as error:  # the next network may do
        traceback.print_exc()
        row["failed"] = f"{type(error).__name__}: {error}"
    return row


def choose(models: Sequence[str] | None, device: torch.device) -> list[str]:
    """Decides which networks to run.

    Args:
        models: names that were asked for; None if none were.
        device: to compare with the CPU.

    Returns:
        The names; by default all, but no large ones where there is no GPU.
    """
    if models is None:
        if device != CPU:
            return [*_SMALL, *LARGE_MODELS]
        print(f"Left out without a GPU, unless --models names them: {', '.join(LARGE_MODELS)}.")
        return [*_SMALL]
    known = [*MODELS, *LARGE_MODELS]
    if unknown := [name for name in models if name not in known]:
        sys.exit(f"error: unknown models {', '.join(unknown)}: choose from {', '.join(known)}")
    return [*models]


def make_parser() -> ArgumentParser:
    """Describes the command line.

    Returns:
        The parser.
    """
    parser = ArgumentParser(prog="gpu_check.py", description=__doc__)
    parser.add_argument(
        "--models",
        type=str,
        nargs="+",
        default=None,
        help="networks; by default all, but large ones only on a GPU",
    )
    parser.add_argument("--samples", type=int, default=500, help="number of random images")
    parser.add_argument("--batch-size", type=int, default=250, help="images in a batch")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the shortest counts")
    parser.add_argument(
        "--large-samples", type=int, default=300, help="samples that a large network is timed on"
    )
    parser.add_argument(
        "--large-batch-size", type=int, default=32, help="samples in a batch of a large network"
    )
    parser.add_argument("--tolerance", type=float, default=1e-2, help="largest difference allowed")
    parser.add_argument("--output", type=Path | None, default=None, help="JSON file to write")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the check from the command line; fails if the devices differ.

    Args:
        arguments: of the command line; None reads `sys.argv`.
    """
    flags = make_parser().parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == CPU:
        print("No GPU was found: the CPU is compared with itself.")
    models = choose(flags.models, device)
    rows = [
        row for model in models if model not in LARGE_MODELS for row in check(model, flags, device)
    ]
    large = [check_large(model, flags, device) for model in models if model in LARGE_MODELS]
    names = ("samples", "batch_size", "repeats", "large_samples", "large_batch_size")
    config = {"models": models, **{name: flags[name] for name in names}}
    report = {"device": device.type, "rows": rows, "large": large}
    print(gpu_table(write_benchmark_report(report, config, flags.output, device)))
    if failed := [f"{row['model']}: {row['failed']}" for row in large if "failed" in row]:
        sys.exit(f"error: {'; '.join(failed)}")
    differences = [
        float(row["relative_difference"]) for row in (*rows, *large) if "relative_difference" in row
    ]
    if not all(difference <= flags.tolerance for difference in differences):  # nan fails, too
        sys.exit(f"error: the devices differ by more than {flags.tolerance:.0e}")


if __name__ == "__main__":
    main()
