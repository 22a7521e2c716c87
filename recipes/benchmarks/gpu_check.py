"""Checks that a GPU gives the same curvature and merged model as the CPU, and how fast.

Runs the callback, the extraction and a merge of three clients on the CPU and on the GPU, for LeNet
and a small ResNet with random data. Without a GPU it says so, and compares the CPU with itself.
"""

from __future__ import annotations

import logging
import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jsonargparse import ArgumentParser
from simulation.device_steps import CPU, DeviceSteps, relative_difference
from simulation.json_report import write_benchmark_report
from simulation.tables.benchmarks import gpu_table
from simulation.timing import timed


def check(model: str, flags: Namespace, device: torch.device) -> list[dict[str, str | float]]:
    """Times and compares every step for one network.

    Args:
        model: name of the network.
        flags: of the command line.
        device: to compare with the CPU.

    Returns:
        A row for each step: seconds on both devices and the relative difference.
    """
    rows: list[dict[str, str | float]] = []
    with TemporaryDirectory() as folder:
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


def make_parser() -> ArgumentParser:
    """Describes the command line.

    Returns:
        The parser.
    """
    parser = ArgumentParser(prog="gpu_check.py", description=__doc__)
    parser.add_argument(
        "--models", type=str, nargs="+", default=["lenet", "resnet8"], help="networks"
    )
    parser.add_argument("--samples", type=int, default=1000, help="number of random images")
    parser.add_argument("--batch-size", type=int, default=250, help="images in a batch")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the shortest counts")
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
    torch.backends.cudnn.allow_tf32 = False  # convolutions would round to 10 bits by default
    rows = [row for model in flags.models for row in check(model, flags, device)]
    config = {name: flags[name] for name in ("models", "samples", "batch_size", "repeats")}
    report = {"device": device.type, "rows": rows}
    print(gpu_table(write_benchmark_report(report, config, flags.output, device)))
    differences = [float(row["relative_difference"]) for row in rows]
    if not all(difference <= flags.tolerance for difference in differences):  # nan fails, too
        sys.exit(f"error: the devices differ by more than {flags.tolerance:.0e}")


if __name__ == "__main__":
    main()
