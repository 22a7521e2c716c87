"""Plans the curvature of models of a billion weights, and merges layers of their size.

The plans need no weights. Three layers of a transformer block (an attention projection and an MLP)
are then real: curvature is extracted from random data, written, and merged for some clients under a
small memory budget. Time and memory are compared with the plan, and extrapolated to whole models.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse import ArgumentParser
from simulation.json_report import write_benchmark_report
from simulation.memory import peak_memory
from simulation.tables.benchmarks import large_models_table
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher import ClientUpdate, extract_curvature, merge_updates, plan_update
from lightning_fedfisher.curvature.registry import CurvatureType
from lightning_fedfisher.plan import UpdatePlan

MODELS = {"1B": (16, 2048, 8192), "7B": (32, 4096, 11008)}
"""Layers, width and MLP width of the models that are planned."""

METHODS: dict[CurvatureType, str] = {"input_gram": "regmean", "diagonal": "fisher_merge"}
"""What is measured: kinds of curvature, and the method that merges each."""

_PLANNED: tuple[CurvatureType, ...] = ("kfac", *METHODS)


def llama(layers: int, width: int, hidden: int, vocabulary: int) -> nn.Module:
    """Makes the modules of a Llama-like language model; it has no forward pass.

    Args:
        layers: number of its blocks.
        width: of the residual stream.
        hidden: width of the MLPs.
        vocabulary: number of tokens.

    Returns:
        The model, on the default device.
    """

    def block() -> nn.ModuleDict:
        maps = {name: nn.Linear(width, width, bias=False) for name in ("q", "k", "v", "o")}
        maps |= {name: nn.Linear(width, hidden, bias=False) for name in ("gate", "up")}
        maps["down"] = nn.Linear(hidden, width, bias=False)
        norms = {name: nn.RMSNorm(width) for name in ("before_attention", "before_mlp")}
        return nn.ModuleDict({**maps, **norms})

    parts: dict[str, nn.Module] = {"embedding": nn.Embedding(vocabulary, width)}
    parts["blocks"] = nn.ModuleList(block() for _ in range(layers))
    parts["norm"], parts["head"] = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
    return nn.ModuleDict(parts)


def part_of_block(width: int, hidden: int) -> nn.Sequential:
    """Makes three layers of a block, an attention projection and an MLP, in a row.

    Args:
        width: of the residual stream.
        hidden: width of the MLP.

    Returns:
        The model, on the default device.
    """
    return nn.Sequential(
        nn.Linear(width, width, bias=False),
        nn.SiLU(),
        nn.Linear(width, hidden, bias=False),
        nn.SiLU(),
        nn.Linear(hidden, width, bias=False),
    )


def trained_part(width: int, hidden: int, client: int) -> nn.Sequential:
    """Makes the real layers of one client: those of all clients, and a little noise.

    Args:
        width: of the residual stream.
        hidden: width of the MLP.
        client: seed of the noise.

    Returns:
        The model.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = part_of_block(width, hidden)
        torch.manual_seed(client + 1)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.1 * float(weight.std()))
    return model


def measure(curvature: CurvatureType, flags: Any, folder: Path) -> dict[str, Any]:
    """Extracts, writes and merges updates of the real layers.

    Args:
        curvature: kind of curvature.
        flags: of the command line.
        folder: where the files go.

    Returns:
        Processor seconds and peak memory of an extraction and of the merge beside what was
        planned for each, and the bytes of a file.
    """
    paths = []
    for client in range(flags.clients):
        model = trained_part(flags.width, flags.hidden, client)
        generator = torch.Generator().manual_seed(client)
        x, y = (torch.randn(flags.samples, flags.width, generator=generator) for _ in range(2))
        loader = DataLoader(TensorDataset(x, y), flags.batch_size)
        options: dict[str, Any] = {"likelihood": "gaussian", "max_samples": None, "progress": False}
        found, extraction = _measured(
            partial(extract_curvature, model, loader, curvature, **options)
        )
        update = ClientUpdate.from_model(model, found.header(), found.blocks)
        paths.append(update.save(folder / f"{curvature}-{client}.safetensors"))
    plan = plan_part(curvature, flags)
    del model, found, update  # whose memory is none of the server's
    result, merged = _measured(
        lambda: merge_updates(
            paths, method=METHODS[curvature], memory_budget=flags.memory_budget, device="cpu"
        )
    )
    return {
        "method": METHODS[curvature],
        "extraction": extraction | {"planned_bytes": plan.client_bytes},
        "merge": merged | {"planned_bytes": plan.server_bytes, "solved": result.solved},
        "file": {"bytes": paths[0].stat().st_size, "planned_bytes": plan.file_bytes},
    }


def _measured(run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What a function returns, its processor seconds and its peak memory."""
    started = time.process_time()
    result, peak = peak_memory(run)
    return result, {"seconds": time.process_time() - started, "peak_bytes": peak}


def plan_part(curvature: CurvatureType, flags: Any) -> UpdatePlan:
    """Plans the real layers.

    Args:
        curvature: kind of curvature.
        flags: of the command line.

    Returns:
        The plan.
    """
    with torch.device("meta"):
        model = part_of_block(flags.width, flags.hidden)
    return _plan(model, curvature, flags)


def _plan(model: nn.Module, curvature: CurvatureType, flags: Any) -> UpdatePlan:
    clients, memory_budget = flags.clients, flags.memory_budget
    return plan_update(model, curvature, clients=clients, memory_budget=memory_budget)


def _numbers(plan: UpdatePlan) -> dict[str, float]:
    """What the table shows of a plan."""
    return {
        "weights": sum(math.prod(planned.layer.shape) for planned in plan.layers),
        "file_bytes": plan.file_bytes,
        "upload_bytes": plan.upload_bytes,
        "client_bytes": plan.client_bytes,
        "server_bytes": plan.server_bytes,
        "largest_factor": max(plan.largest.factor_sides, default=0),
        "decomposition": plan.decomposition,
    }


def _estimate(found: dict[str, Any], part: UpdatePlan, plan: UpdatePlan, samples: int) -> Any:
    """Seconds for a whole model, by the work that it is beside the real layers'."""
    token = found["extraction"]["seconds"] / samples
    times = extraction_work(plan) / extraction_work(part)
    return {
        "merge_seconds": found["merge"]["seconds"] * merge_work(plan) / merge_work(part),
        "extraction_seconds_of_1000_tokens": 1000 * token * times,
    }


def merge_work(plan: UpdatePlan) -> float:
    """Counts what a merge of a model comes to, to compare models by.

    Args:
        plan: of the model.

    Returns:
        For each layer with a factor of ``n`` columns, ``n^3`` for its decomposition and ``n^2``
        for each row and client, by which it is multiplied; for others their weights.
    """
    work = 0.0
    for planned in plan.layers:
        rows, columns = planned.layer.shape
        each = columns if planned.factor_sides else 1
        work += columns * each * rows * plan.clients
        work += sum(side**3 for side in planned.factor_sides)
    return work


def extraction_work(plan: UpdatePlan) -> float:
    """Counts what an extraction comes to for a token.

    Args:
        plan: of the model.

    Returns:
        The products of a forward pass, and those that are added up.
    """
    return sum(
        math.prod(planned.layer.shape) + sum(side**2 for side in planned.factor_sides)
        for planned in plan.layers
    )


def run(flags: Any) -> dict[str, Any]:
    """Plans, measures and extrapolates.

    Args:
        flags: of the command line.

    Returns:
        The report: plans, what was measured, and estimates from it, by model and curvature.
    """
    plans: dict[str, dict[CurvatureType, UpdatePlan]] = {}
    for name in flags.models:
        with torch.device("meta"):
            model = llama(*MODELS[name], flags.vocabulary)
        plans[name] = {kind: _plan(model, kind, flags) for kind in _PLANNED}
        for plan in plans[name].values():
            print(f"{name}: {plan.report}\n", flush=True)
    measured = {}
    for kind in METHODS:
        with TemporaryDirectory(dir=flags.folder) as folder:
            measured[kind] = measure(kind, flags, Path(folder))
        print(kind, measured[kind], flush=True)
    return {
        "plans": {
            name: {kind: _numbers(plan) for kind, plan in own.items()}
            for name, own in plans.items()
        },
        "measured": measured,
        "estimates": {
            name: {
                kind: _estimate(found, plan_part(kind, flags), own[kind], flags.samples)
                for kind, found in measured.items()
            }
            for name, own in plans.items()
        },
    }


def make_parser() -> ArgumentParser:
    """Describes the command line.

    Returns:
        The parser.
    """
    parser = ArgumentParser(prog="large_models.py", description=__doc__)
    parser.add_argument(
        "--models", type=str, nargs="+", default=list(MODELS), help="models to plan"
    )
    parser.add_argument("--vocabulary", type=int, default=32000, help="tokens of the models")
    parser.add_argument("--width", type=int, default=2048, help="width of the real layers")
    parser.add_argument("--hidden", type=int, default=8192, help="width of the real MLP")
    parser.add_argument("--clients", type=int, default=3, help="number of clients")
    parser.add_argument("--samples", type=int, default=512, help="random samples of a client")
    parser.add_argument("--batch-size", type=int, default=64, help="samples in a batch")
    parser.add_argument(
        "--memory-budget", type=int, default=256_000_000, help="bytes of curvature to hold"
    )
    parser.add_argument("--folder", type=Path | None, default=None, help="for temporary files")
    parser.add_argument("--output", type=Path | None, default=None, help="JSON file to write")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line.

    Args:
        arguments: of the command line; None reads `sys.argv`.
    """
    flags = make_parser().parse_args(arguments)
    config = {name: value for name, value in flags.items() if name not in ("folder", "output")}
    print(large_models_table(write_benchmark_report(run(flags), config, flags.output)))


if __name__ == "__main__":
    main()
