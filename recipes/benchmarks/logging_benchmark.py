"""Measures what logging costs: runs of `cifar_resnet.py` with W&B and without, in turns.

Seconds spent in logging calls are added up in the runs with W&B, and seconds spent on the page in
all of them; the pairs of whole runs show what that leaves out. All other flags are those of
`cifar_resnet.py`.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import WandbLogger
from simulation import federation, results
from simulation import round as one_round
from simulation.flags import Flags, flags_from, flags_parser
from simulation.json_report import write_benchmark_report
from simulation.tables.benchmarks import logging_table

from lightning_fedfisher import FedFisherCallback, merge_module

LOGGING = [
    (one_round, "federation_logger"),
    (one_round, "_show_classes"),
    (one_round, "_close"),
    (FedFisherCallback, "_log"),
    (merge_module, "define_merge_axes"),
    (merge_module, "log_merge"),
    (WandbLogger, "log_metrics"),
    (WandbLogger, "log_hyperparams"),
    (WandbLogger, "finalize"),
    (federation, "log_federation"),
    (federation, "log_merged_model"),
]
"""The functions in which a run with W&B spends time that one without does not."""

PAGE = [(federation, "record_round"), (results, "write_report")]
"""The functions in which a run spends time on its record and page."""


class Stopwatch:
    """Adds up the time spent in functions, each moment once however they nest.

    Attributes:
        seconds: the time so far.
    """

    def __init__(self) -> None:
        """Starts at zero."""
        self.seconds, self._inside = 0.0, False

    @contextmanager
    def watching(self, places: Sequence[tuple[Any, str]]) -> Iterator[None]:
        """Times calls of functions for as long as the block lasts.

        Args:
            places: modules or classes, and names of functions in them.

        Yields:
            Nothing.
        """
        with ExitStack() as stack:
            for owner, name in places:
                stack.enter_context(mock.patch.object(owner, name, self._timed(owner, name)))
            yield

    def _timed(self, owner: Any, name: str) -> Callable[..., Any]:
        """The same function, with a clock that runs while it does."""
        function = getattr(owner, name)

        @wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            if self._inside:
                return function(*arguments, **options)
            self._inside, started = True, time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self._inside = False
                self.seconds += time.perf_counter() - started

        return timed


def timed_run(flags: Flags, wandb: str) -> dict[str, float]:
    """Simulates a federation once.

    Args:
        flags: of `cifar_resnet.py`.
        wandb: mode of W&B.

    Returns:
        Seconds of the run, in logging calls, and on its record and page.
    """
    logged, page = Stopwatch(), Stopwatch()
    with TemporaryDirectory() as folder, logged.watching(LOGGING), page.watching(PAGE):
        started = time.perf_counter()
        federation.run(replace(flags, wandb=wandb, output_dir=Path(folder) / "out"))
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "logging_seconds": logged.seconds, "page_seconds": page.seconds}


def make_parser() -> ArgumentParser:
    """Describes the command line, which takes the flags of `cifar_resnet.py` as well.

    Returns:
        The parser.
    """
    parser = flags_parser(__doc__, "logging_benchmark.py")
    parser.add_argument("--repeats", type=int, default=3, help="number of pairs of runs")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line.

    Args:
        arguments: of the command line; None reads `sys.argv`.
    """
    own = make_parser().parse_args(arguments)
    flags = flags_from(own)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    os.environ.setdefault("WANDB_SILENT", "true")
    runs: dict[str, list[dict[str, float]]] = {"offline": [], "disabled": []}
    try:
        for repeat in range(own.repeats):
            modes = ["offline", "disabled"]
            for mode in modes if repeat % 2 == 0 else reversed(modes):
                runs[mode].append(timed_run(flags, mode))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    settled = {"repeats": own.repeats, **flags.plain(), "wandb": "offline and disabled"}
    settled = {name: value for name, value in settled.items() if name != "data_dir"}
    print(logging_table(write_benchmark_report({"runs": runs}, settled, own.output)))


if __name__ == "__main__":
    main()
