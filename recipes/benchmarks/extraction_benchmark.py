"""Measures what curvature costs beside other libraries, in units of a training epoch.

Everything runs in one process on one trained client of the curvature study, on the same samples and
in the same batches. Other libraries are measured where they are installed and support the network:
`pip install nngeometry==0.4 curvlinops-for-pytorch`.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser
from simulation.data import TensorImages, collate_images, load_images
from simulation.federations import benchmark_federation
from simulation.json_report import write_benchmark_report
from simulation.memory import peak_memory, status_bytes
from simulation.models import build_model
from simulation.study import fit_federation
from simulation.timing import timed
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.extraction.extract import extract_curvatures
from lightning_fedfisher.extraction.layer_report import CurvatureType

_ALL: tuple[CurvatureType, ...] = ("kfac", "diagonal", "ekfac")
_TRAINING_BATCH = 64


def train_epoch(network: nn.Module, samples: TensorImages, batch_size: int) -> None:
    """Trains for one epoch of SGD as the clients do, in plain PyTorch.

    Args:
        network: trained in place.
        samples: the client's training samples.
        batch_size: samples in a step of SGD.
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
        network: the trained network.
        loader: over the samples.
        kinds: kinds of curvature, extracted in one pass.
        **options: of the extraction, such as ``fisher``.

    Returns:
        The curvature of each layer, by kind.
    """
    found = extract_curvatures(
        network, loader, kinds, progress=False, **{"max_samples": None} | options
    )
    return {kind: extracted.blocks for kind, extracted in found.items()}


def others(network: nn.Module, x: Tensor, y: Tensor, batch: int) -> dict[str, Callable[[], Any]]:
    """Prepares the exact Fisher of a classifier by every other library that is installed.

    Args:
        network: the trained network.
        x: images ``(n, channels, height, width)``.
        y: labels ``(n,)``.
        batch: samples in a batch.

    Returns:
        Functions to time, by the name of library and curvature.
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
    """Rebuilds LeNet or the CNN from modules alone, as BackPACK needs it.

    Args:
        network: any network.

    Returns:
        The same function with copied weights, or None for other networks.
    """
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
    """Compares curvature with a reference in float64, as operators on random matrices.

    (Eigenvectors have no sign, so EKFAC's tensors cannot be compared.)

    Args:
        found: curvature of each layer, by kind.
        expected: the same in float64.

    Returns:
        The largest relative error (Frobenius norm) of any layer, by kind.
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


def make_parser() -> ArgumentParser:
    """Describes the command line.

    Returns:
        The parser.
    """
    parser = ArgumentParser(prog="extraction_benchmark.py", description=__doc__)
    parser.add_argument("--model", type=str, default="lenet", help="lenet, cnn or resnet18")
    parser.add_argument("--samples", type=int, default=5000, help="most samples of the client")
    parser.add_argument("--batch-size", type=int, default=1000, help="samples in a batch")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the shortest counts")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder of images")
    parser.add_argument(
        "--clients-dir",
        type=Path,
        default=Path("runs/curvature_study"),
        help="folder of the curvature study's trained clients",
    )
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
    report = large_network(flags) if flags.model == "resnet18" else trained_client(flags)
    config = {name: flags[name] for name in ("model", "samples", "batch_size", "repeats")}
    write_benchmark_report(report, config, flags.output)


def trained_client(flags: Any) -> dict[str, Any]:
    """Measures extraction from a trained client.

    Args:
        flags: of the command line.

    Returns:
        Seconds, errors and memory, as the JSON file holds them.
    """
    federation = benchmark_federation(flags.model)
    images = load_images(federation.dataset, flags.data_dir)
    network, trained_on = next(
        fit_federation(federation, images, flags.clients_dir / federation.name)
    )
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


def large_network(flags: Any) -> dict[str, Any]:
    """Measures extraction from ResNet18 on 32x32 images.

    It is untrained: no sample is certain, so that none of the work can be left out.

    Args:
        flags: of the command line.

    Returns:
        Seconds and memory, as the JSON file holds them.
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
    """All images and labels as two tensors."""
    loader = DataLoader(samples, batch_size=len(samples), collate_fn=collate_images)
    x, y = next(iter(loader))
    return x, y


if __name__ == "__main__":
    main()
