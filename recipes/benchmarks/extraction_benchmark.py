"""What curvature costs: this package beside others, in one process, in units of a training epoch.

On one trained client of the curvature study. Everything runs on the same samples and in the same
batches. Other libraries are measured where they are installed and can do it:
`pip install nngeometry==0.4 curvlinops-for-pytorch`.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar_resnet import environment
from jsonargparse import ArgumentParser
from simulation.data import TensorImages, collate_images, load_images
from simulation.memory import peak_memory, status_bytes
from simulation.models import build_model
from simulation.study import fit_cell
from studies.curvature_study import CELLS
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.extraction.extract import extract_curvatures
from lightning_fedfisher.extraction.layer_report import CurvatureType

_ALL: tuple[CurvatureType, ...] = ("kfac", "diagonal", "ekfac")
_TRAINING_BATCH = 64


def train_epoch(network: nn.Module, samples: TensorImages, batch_size: int) -> None:
    """One epoch of SGD as the clients train, in plain PyTorch.

    Args:
        network: trained in place.
        samples: the client's.
        batch_size: of SGD.
    """
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
    loader = DataLoader(samples, batch_size=batch_size, shuffle=True, collate_fn=collate_images)
    for x, y in loader:
        optimizer.zero_grad()
        functional.cross_entropy(network(x), y).backward()
        optimizer.step()


def ours(
    network: nn.Module, loader: DataLoader[Any], kinds: Sequence[CurvatureType], **options: Any
) -> dict[CurvatureType, Mapping[str, Curvature]]:
    """Extracts with this package.

    Args:
        network: trained.
        loader: over the samples.
        kinds: of curvature.
        **options: of the extraction.

    Returns:
        Blocks by kind.
    """
    found = extract_curvatures(
        network, loader, kinds, progress=False, **{"max_samples": None} | options
    )
    return {kind: extracted.blocks for kind, extracted in found.items()}


def others(network: nn.Module, x: Tensor, y: Tensor, batch: int) -> dict[str, Callable[[], Any]]:
    """What other libraries offer for the exact Fisher of a classifier.

    Args:
        network: trained.
        x: images.
        y: labels.
        batch: samples a batch.

    Returns:
        Something to run, by name.
    """
    loader = DataLoader(TensorDataset(x, y), batch_size=batch)
    runs: dict[str, Callable[[], Any]] = {}
    if importlib.util.find_spec("nngeometry"):
        from nngeometry.metrics import FIM
        from nngeometry.object import PMatDiag, PMatKFAC

        def fisher(representation: Any) -> Any:
            return FIM(model=network, loader=loader, representation=representation)

        runs["NNGeometry, exact K-FAC"] = lambda: fisher(PMatKFAC)
        runs["NNGeometry, exact diagonal"] = lambda: fisher(PMatDiag)
    from backpack import backpack, extend, extensions

    def through_backpack(extension: Any, whole: nn.Module) -> None:
        loss = extend(nn.CrossEntropyLoss(reduction="sum"))
        for inputs, labels in loader:
            with backpack(extension):
                loss(whole(inputs), labels).backward()
            whole.zero_grad()

    sequential = as_sequential(network)
    if sequential is not None:
        whole = extend(sequential)
        runs["BackPACK, exact diagonal"] = lambda: through_backpack(
            extensions.DiagGGNExact(), whole
        )
        runs["BackPACK, exact K-FAC"] = lambda: through_backpack(extensions.KFLR(), whole)
    if importlib.util.find_spec("curvlinops"):
        from curvlinops import KFACLinearOperator

        def operator() -> Any:
            weights = list(network.parameters())
            linear = KFACLinearOperator(
                network,
                nn.CrossEntropyLoss(),
                weights,
                loader,
                fisher_type="type-2",
                check_deterministic=False,
            )
            # It computes when first applied.
            return linear @ torch.ones(linear.shape[1])

        runs["curvlinops, exact K-FAC"] = operator
    return runs


def as_sequential(network: nn.Module) -> nn.Module | None:
    """LeNet and the CNN as BackPACK wants them; None for other networks."""
    if not hasattr(network, "fc3"):
        return None
    own: Any = copy.deepcopy(network)
    pool, act = nn.MaxPool2d, nn.ReLU
    return nn.Sequential(
        *(own.conv1, act(), pool(2), own.conv2, act(), pool(2), nn.Flatten()),
        *(own.fc1, act(), own.fc2, act(), own.fc3),
    )


def errors(
    found: Mapping[CurvatureType, Mapping[str, Curvature]],
    expected: Mapping[CurvatureType, Mapping[str, Curvature]],
) -> dict[str, float]:
    """Largest relative error (Frobenius) of any layer's block, by kind.

    EKFAC is compared as an operator, because eigenvectors have no sign.

    Args:
        found: blocks by kind.
        expected: blocks by kind, in float64.

    Returns:
        The errors.
    """
    worst: dict[str, float] = {}
    for kind, blocks in expected.items():
        for name, block in blocks.items():
            probe = torch.randn(64, *block.shape, generator=torch.Generator().manual_seed(0))
            for part in probe.double():
                right = block.apply(part)
                mine = found[kind][name].apply(part.float()).double()
                error = float((mine - right).norm() / right.norm())
                worst[kind] = max(worst.get(kind, 0.0), error)
    return worst


def timed(run: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """Runs something several times.

    Args:
        run: what to run.
        repeats: how often.

    Returns:
        Its last result, and the shortest time in seconds.
    """
    seconds = []
    result = None
    for _ in range(repeats):
        started = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - started)
    return result, min(seconds)


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = ArgumentParser(prog="extraction_benchmark.py", description=__doc__)
    parser.add_argument("--model", type=str, default="lenet", help="lenet, cnn or resnet18")
    parser.add_argument("--samples", type=int, default=5000, help="of the client, at most")
    parser.add_argument("--batch-size", type=int, default=1000, help="of every extraction")
    parser.add_argument("--repeats", type=int, default=3, help="of which the shortest counts")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="of image folders")
    parser.add_argument("--clients-dir", type=Path, default=Path("runs/curvature_study"))
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    flags = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    report = large(flags) if flags.model == "resnet18" else client(flags)
    config = {name: flags[name] for name in ("model", "samples", "batch_size", "repeats")}
    write_report(report, config, flags.output)


def write_report(
    report: Mapping[str, Any], config: Mapping[str, Any], output: Path | None
) -> dict[str, Any]:
    """Prints a benchmark's report, and writes it if asked to.

    Args:
        report: what was measured.
        config: what it was asked for.
        output: JSON file to write.

    Returns:
        The report with its config, the hardware and the date.
    """
    whole = {**report, "config": dict(config), "environment": environment(torch.device("cpu"))}
    text = json.dumps(whole, indent=2, default=str) + "\n"
    print(text)
    if output is not None:
        output.write_text(text)
    return whole


def client(flags: Any) -> dict[str, Any]:
    """Measures on a trained client.

    Args:
        flags: of the command line.

    Returns:
        The report.
    """
    cell = next(cell for cell in CELLS["development"] if cell.model == flags.model)
    images = load_images(cell.dataset, flags.data_dir)
    network, trained_on = next(fit_cell(cell, images, flags.clients_dir / cell.name))
    every = trained_on.without_augmentation()
    chosen = np.random.default_rng(0).permutation(len(every))[: flags.samples]
    samples = every.subset(np.sort(chosen))
    x, y = _stack(samples)
    plain = DataLoader(TensorDataset(x, y), batch_size=flags.batch_size)
    trained = copy.deepcopy(network)
    # Before anything else leaves its traces in the allocator.
    memory = {}
    train_epoch(trained, samples.subset(np.arange(len(samples))[:250]), 250)
    few = DataLoader(TensorDataset(x[:1000], y[:1000]), batch_size=250)
    step = samples.subset(np.arange(len(samples))[:1000])
    _, memory["training"] = peak_memory(lambda: train_epoch(trained, step, 250))
    for name, options in {
        "normalised K-FAC": {"kinds": ("kfac",)},
        "exact K-FAC": {"kinds": ("kfac",), "fisher": "exact"},
        "exact EKFAC": {"kinds": ("ekfac",), "fisher": "exact"},
    }.items():
        _, memory[name] = peak_memory(lambda options=options: ours(network, few, **options))
    rows: dict[str, Any] = {}
    _, epoch = timed(lambda: train_epoch(trained, samples, _TRAINING_BATCH), flags.repeats)

    def row(name: str, run: Callable[[], Any], repeats: int = flags.repeats) -> Any:
        result, seconds = timed(run, repeats)
        rows[name] = {"seconds": seconds, "epochs": seconds / epoch}
        print(f"{name}: {seconds:.2f} s, {seconds / epoch:.2f} epochs", flush=True)
        return result

    fast = row(
        "ours, exact K-FAC, diagonal and EKFAC", lambda: ours(network, plain, _ALL, fisher="exact")
    )
    row("ours, exact K-FAC", lambda: ours(network, plain, ("kfac",), fisher="exact"))
    row("ours, exact EKFAC", lambda: ours(network, plain, ("ekfac",), fisher="exact"))
    row("ours, normalised K-FAC", lambda: ours(network, plain, ("kfac",)))
    row("ours, normalised EKFAC", lambda: ours(network, plain, ("ekfac",)))
    for name, run in others(network, x, y, flags.batch_size).items():
        try:
            row(name, run, 1)
        except Exception as error:  # another library's failure is a result
            rows[name] = {"failed": f"{type(error).__name__}: {error}"[:200]}
            print(name, rows[name])
    whole = DataLoader(TensorDataset(x.double(), y), batch_size=flags.batch_size)
    exact = ours(copy.deepcopy(network).double(), whole, _ALL, fisher="exact", tolerance=0.0)
    # The default, as the callback runs it: a twelfth of all of the client's samples.
    loader = DataLoader(every, batch_size=250, collate_fn=collate_images)
    _, default = timed(lambda: ours(network, loader, ("kfac",), max_samples="auto"), flags.repeats)
    _, own = timed(lambda: train_epoch(trained, trained_on, _TRAINING_BATCH), flags.repeats)
    reference = rows.get("NNGeometry, exact K-FAC"), rows.get("NNGeometry, exact diagonal")
    return {
        "client_samples": len(every),
        "samples": len(samples),
        "epoch_seconds": epoch,
        "rows": rows,
        "times_faster_than_nngeometry": (
            sum(r["seconds"] for r in reference if r)
            / rows["ours, exact K-FAC, diagonal and EKFAC"]["seconds"]
            if all(reference)
            else None
        ),
        "relative_errors": errors(fast, exact),
        "default_seconds": default,
        "own_epoch_seconds": own,
        "default_epochs": default / own,
        "peak_bytes_batch_250": memory,
    }


def large(flags: Any) -> dict[str, Any]:
    """Measures ResNet18 on 32x32 images, untrained: no sample is certain, so nothing is saved.

    Args:
        flags: of the command line.

    Returns:
        The report.
    """
    torch.manual_seed(0)
    network = build_model("resnet18", 3, 32, 10)
    x, y = torch.randn(flags.samples, 3, 32, 32), torch.randint(0, 10, (flags.samples,))
    loader = DataLoader(TensorDataset(x, y), batch_size=flags.batch_size)
    rows = {}
    for name, options in {
        "normalised K-FAC": {"kinds": ("kfac",)},
        "exact EKFAC": {"kinds": ("ekfac",), "fisher": "exact"},
    }.items():
        started = time.perf_counter()
        _, peak = peak_memory(lambda options=options: ours(network, loader, **options))
        rows[name] = {"seconds": time.perf_counter() - started, "peak_bytes": peak}
        print(name, rows[name], flush=True)
    rows["process"] = {"peak_bytes": status_bytes("VmHWM")}
    return {"samples": flags.samples, "rows": rows}


def _stack(samples: TensorImages) -> tuple[Tensor, Tensor]:
    loader = DataLoader(samples, batch_size=len(samples), collate_fn=collate_images)
    x, y = next(iter(loader))
    return x, y


if __name__ == "__main__":
    main()
