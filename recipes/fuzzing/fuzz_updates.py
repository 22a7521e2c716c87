"""Tests whether a file can harm a server: opens, verifies and reads many mutated updates.

A file must be refused with an `UpdateError`, or be an update like any other: finite, of the shapes
that its header states, and merged beside honest ones or refused by name; and it must take little
time and memory. Anything else is counted as a crash, and the command fails.
"""

from __future__ import annotations

import itertools
import logging
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from fuzzing.mutations import MUTATIONS
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table
from simulation.clients import QUIET, merge
from simulation.json_report import write_benchmark_report
from simulation.memory import reset_peak, status_bytes
from simulation.tables.benchmarks import fuzz_rows
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from lightning_fedfisher import ClientUpdate, extract_curvature
from lightning_fedfisher.errors import MergeError, UpdateError
from lightning_fedfisher.update.compression import compress

_CURVATURES = ("kfac", "ekfac", "diagonal", "identity")
_BUDGETS = (None, 2.0, 1.6)  # of the plain file: so small, it is smaller than with what is packed
_MOST_SECONDS = 2.0  # of a processor
_MOST_BYTES, _MOST_TIMES = 2**26, 3  # of memory, and as a multiple of the file
_MERGED = 20  # one accepted file of so many is merged as well


class _Network(nn.Module):
    """A small network whose update holds layers, normalisation, buffers and a shared weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 4, bias=False)
        self.norm, self.third, self.head = nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.third.weight = self.second.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.relu(self.second(torch.relu(self.first(x)))))
        logits: torch.Tensor = self.head(self.third(x))
        return logits


def sound_files(folder: Path) -> list[list[Path]]:
    """Writes honest updates of three clients for each kind of curvature and budget.

    Args:
        folder: to write them to.

    Returns:
        A list of three files for each kind and budget.
    """
    groups = []
    for curvature, budget in itertools.product(_CURVATURES, _BUDGETS):
        torch.manual_seed(0)
        network, files = _Network().eval(), []
        for client in range(3):
            data = TensorDataset(torch.randn(40, 6), torch.randint(0, 3, (40,)))
            loader = DataLoader(data, batch_size=20)
            found = extract_curvature(network, loader, curvature, max_samples=None, progress=False)
            update = ClientUpdate.from_model(network, found.header(), found.blocks)
            if budget is not None:
                size = int(budget * update.upload_bytes)
                update = ClientUpdate(*compress(update.header, dict(update._tensors), size))
            files.append(update.save(folder / f"{curvature}-{budget}-{client}.safetensors"))
        groups.append(files)
    return groups


def examine(path: Path) -> bool:
    """Opens, verifies and reads a file, as a server does.

    Args:
        path: of the file.

    Returns:
        True if the file is accepted, False if it is refused.

    Raises:
        AssertionError: if it is accepted and holds what is no curvature.
    """
    try:
        update = ClientUpdate.open(path)
        update.verify()
        for layer in update.layers:
            block = update.block(layer)
            assert update.weights(layer).shape == block.shape == layer.shape
            assert all(bool(tensor.isfinite().all()) for tensor in block.tensors().values())
        assert all(t.shape == update.specs[n][0] for n, t in update.buffers.items())
    except UpdateError:
        return False
    return True


def merges(path: Path, honest: Sequence[Path]) -> bool:
    """Merges a mutated file with honest ones.

    Args:
        path: of the mutated file.
        honest: updates of the same model.

    Returns:
        True if it was merged, False if it was refused by name.

    Raises:
        AssertionError: if the merged model is not finite.
    """
    method: str = "fedavg" if "identity" in honest[0].name else "fedfisher"
    try:
        merged = merge(method, [*honest, path], _Network(), None, QUIET)
    except MergeError:
        return False
    assert all(bool(tensor.isfinite().all()) for tensor in merged.state_dict.values())
    return True


def fuzz(folder: Path, files: int, seed: int) -> Iterator[tuple[str, str, float]]:
    """Mutates and examines one file after the other.

    Args:
        folder: where files are written.
        files: how many to mutate.
        seed: of the mutations.

    Yields:
        For each file the kind of mutation, what became of it, and the seconds that took.
    """
    dice = random.Random(seed)
    groups = sound_files(folder)
    sound = [path.read_bytes() for paths in groups for path in paths]
    path, accepted = folder / "mutant.safetensors", 0
    for _ in range(files):
        kind = dice.choice(list(MUTATIONS))
        group = dice.randrange(len(groups))
        path.write_bytes(MUTATIONS[kind](sound[3 * group], dice.choice(sound), dice))
        started = time.process_time()  # not those of others on this machine
        try:
            before = reset_peak()
            found = examine(path)
            taken = status_bytes("VmHWM") - before
            if taken > _MOST_BYTES + _MOST_TIMES * path.stat().st_size:
                raise AssertionError(f"it takes {taken:.0f} bytes of memory")
            if (seconds := time.process_time() - started) > _MOST_SECONDS:
                raise AssertionError(f"it takes {seconds:.1f} seconds")
            outcome = "accepted" if found else "refused"
            accepted += outcome == "accepted"
            if outcome == "accepted" and accepted % _MERGED == 0:
                outcome = "merged" if merges(path, groups[group]) else "refused"
        except Exception as error:
            path.rename(folder / f"crash-{type(error).__name__}-{dice.random()}.safetensors")
            outcome = f"{type(error).__name__}: {error}"[:200]
        yield kind, outcome, time.process_time() - started


def run(files: int, seed: int, folder: Path) -> dict[str, object]:
    """Mutates files, and counts what became of them.

    Args:
        files: how many to mutate.
        seed: of the mutations.
        folder: where files are written.

    Returns:
        The report: files, refused and accepted for each kind of mutation; the seconds of the
        slowest; the growth of memory in bytes; and the errors that were counted as crashes.
    """
    counts: Counter[tuple[str, str]] = Counter()
    slowest, before, began = 0.0, 0.0, time.perf_counter()
    for index, (kind, outcome, seconds) in enumerate(
        tqdm(fuzz(folder, files, seed), total=files, disable=None)
    ):
        counts[kind, outcome] += 1
        if index < min(1000, files // 2):  # code is still being loaded
            before = status_bytes("VmHWM")
        slowest = max(slowest, seconds)
    rows = {
        kind: {
            "files": sum(n for (of, _), n in counts.items() if of == kind),
            "refused": counts[kind, "refused"],
            "accepted": counts[kind, "accepted"] + counts[kind, "merged"],
            "merged": counts[kind, "merged"],
        }
        for kind in MUTATIONS
    }
    return {
        "rows": rows,
        "crashes": sorted({what for _, what in counts} - {"refused", "accepted", "merged"}),
        "slowest_seconds": slowest,
        "memory_growth_bytes": status_bytes("VmHWM") - before,
        "seconds": time.perf_counter() - began,
    }


def make_parser() -> ArgumentParser:
    """Describes the command line.

    Returns:
        The parser.
    """
    parser = ArgumentParser(prog="fuzz_updates.py", description=__doc__)
    parser.add_argument("--files", type=int, default=200_000, help="number of files to mutate")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mutations")
    parser.add_argument("--output", type=Path | None, default=None, help="JSON file to write")
    parser.add_argument(
        "--keep", type=Path | None, default=None, help="folder that keeps files which crash"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the fuzzer from the command line.

    Args:
        arguments: of the command line; None reads `sys.argv`.
    """
    flags = make_parser().parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with TemporaryDirectory() as temporary:
        folder = Path(flags.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report = run(flags.files, flags.seed, folder)
    config = {"files": flags.files, "seed": flags.seed}
    written = write_benchmark_report(report, config, flags.output)
    header, *rows = fuzz_rows(written)
    table = Table(title="mutated update files")
    for name in header:
        table.add_column(name, justify="left" if name == header[0] else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if report["crashes"]:
        sys.exit(f"error: {report['crashes']}")


if __name__ == "__main__":
    main()
