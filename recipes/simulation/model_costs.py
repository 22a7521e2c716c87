"""Measures what one network costs, each time in a process of its own that does nothing else.

`measure` starts the process. Times are the processor's (`time.process_time`) on one thread, and
memory is the peak beyond what was resident after all imports, before the network was built.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_fedfisher import (
    ClientUpdate,
    FedFisherCallback,
    client_run,
    extract_curvature,
    merge_updates,
)
from lightning_fedfisher.extraction.layer_report import LayerReport
from simulation.clients import QUIET
from simulation.memory import peak_memory
from simulation.model_peers import PEERS, run_peer
from simulation.real_models import REAL_MODELS, RealModel

_CLIENTS = 5
_MERGED_SAMPLES = 300  # as many as the callback takes by default
_NOISE = 0.01  # of a client's weights, relative to their root mean square
_FAILURE = 500  # letters of a reason
_STEPS, _STEP_SECONDS = 3, 3.0  # of training: at least


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        model: name of the network, a key of `REAL_MODELS`.
        samples: training samples of the client.
        batch_size: samples in a batch, of training and of extraction.
    """

    model: str
    samples: int
    batch_size: int

    @property
    def network(self) -> RealModel:
        """The network."""
        return REAL_MODELS[self.model]

    def data(self, samples: int, seed: int = 0) -> DataLoader[Any]:
        """Draws a client's data.

        Args:
            samples: number of samples.
            seed: of the draw.

        Returns:
            A loader of batches ``(x, y)``.
        """
        drawn = self.network.draw(samples, torch.Generator().manual_seed(seed))
        return DataLoader(TensorDataset(*drawn), self.batch_size)


def measure(what: str, setting: Setting, folder: Path, minutes: float) -> dict[str, Any]:
    """Measures one thing in a new process.

    Args:
        what: a key of `MEASUREMENTS`.
        setting: of the measurement.
        folder: of the network's update files.
        minutes: that it may take.

    Returns:
        What was measured, or why it was not as ``failed``.
    """
    result = folder / "measured.json"
    result.unlink(missing_ok=True)
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    arguments = [what, json.dumps(asdict(setting)), str(folder)]
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__, *arguments],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=60 * minutes,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {minutes:g} minutes"}
    if done.returncode != 0 or not result.is_file():
        last = done.stderr.strip().splitlines()[-1:] or [""]
        return {"failed": f"exit code {done.returncode}: {last[0]}"[:_FAILURE]}
    measured: dict[str, Any] = json.loads(result.read_text())
    return measured


class _Steps:
    """A network in training."""

    def __init__(self, setting: Setting, network: nn.Module) -> None:
        self._network = network.train()
        weights = [weight for weight in network.parameters() if weight.requires_grad]
        self._optimizer = setting.network.make_optimizer(weights)
        self._batch: tuple[Tensor, Tensor] = next(iter(setting.data(setting.batch_size)))

    def step(self) -> float:
        """Makes one step, and gives its seconds a sample."""
        x, y = self._batch
        started = time.process_time()
        self._optimizer.zero_grad()
        functional.cross_entropy(self._network(x), y).backward()
        self._optimizer.step()
        return (time.process_time() - started) / len(x)

    def seconds(self) -> float:
        """Seconds of a training step a sample: the median of a few steps after the first."""
        self.step()
        started, took = time.process_time(), [self.step()]
        while len(took) < _STEPS or time.process_time() - started < _STEP_SECONDS:
            took.append(self.step())
        return statistics.median(took)


def training(setting: Setting, folder: Path) -> dict[str, Any]:
    """Measures the memory of plain training: network, gradients, optimizer and activations."""
    build = setting.network.load()

    def train() -> None:
        steps = _Steps(setting, build())
        for _ in range(_STEPS):
            steps.step()

    _, peak = peak_memory(train)
    return {"peak_bytes": peak}


class _Untrained(LightningModule):
    """A client whose fit trains nothing, so that only the callback takes time and memory."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @override
    def forward(self, x: Tensor) -> Any:
        return self.network(x)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        return None

    @override
    def configure_optimizers(self) -> None:
        return None


class _TimedCallback(FedFisherCallback):
    """Notes the seconds of the callback's turns at the start of the training and at its end."""

    def __init__(self, output: Path) -> None:
        super().__init__(output)
        self.turns: list[float] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        started = time.process_time()
        super().on_train_start(trainer, pl_module)
        self.turns.append(time.process_time() - started)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        started = time.process_time()
        super().on_train_end(trainer, pl_module)
        self.turns.append(time.process_time() - started)


@contextmanager
def _watched_extractions() -> Iterator[list[tuple[float, int, tuple[LayerReport, ...]]]]:
    """Notes seconds, samples and reports of every extraction of the callback."""
    found: list[tuple[float, int, tuple[LayerReport, ...]]] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        started = time.process_time()
        extracted = extract_curvature(*arguments, **options)
        took = time.process_time() - started
        found.append((took, extracted.num_samples, extracted.layer_reports))
        return extracted

    with mock.patch.object(client_run, "extract_curvature", watched):
        yield found


def client(setting: Setting, folder: Path) -> dict[str, Any]:
    """Measures all that `FedFisherCallback` does on a client, and then training steps."""
    build = setting.network.load()
    loader = setting.data(setting.samples)
    path = folder / "update.safetensors"
    timed = _TimedCallback(path)

    def fit() -> nn.Module:
        module = _Untrained(build())
        options: dict[str, Any] = {**QUIET, "max_epochs": 1, "limit_train_batches": 1}
        Trainer(callbacks=[timed], **options).fit(module, loader)
        return module.network

    with _watched_extractions() as extractions:
        network, peak = peak_memory(fit)
    # Before the training, after its first step, and at its end.
    (rehearsed, _, _), _, (extracted, samples, reports) = extractions
    layers: dict[str, int] = {}
    for report in reports:
        key = f"{report.kind} ({report.backend})"
        layers[key] = layers.get(key, 0) + 1
    assert timed.update is not None
    return {
        "parameters": sum(w.numel() for w in network.parameters() if w.requires_grad),
        "layers": layers,
        "curvature_samples": samples,
        "training_seconds": _Steps(setting, network).seconds(),
        "rehearsal_seconds": rehearsed,
        "rehearsal_packing_seconds": timed.turns[0] - rehearsed,
        "extraction_seconds": extracted,
        "packing_seconds": timed.turns[1] - extracted,
        "peak_bytes": peak,
        "fedavg_bytes": timed.update.fedavg_bytes,
        "upload_bytes": path.stat().st_size,
    }


def updates(setting: Setting, folder: Path) -> dict[str, Any]:
    """Writes the packed updates of clients that differ a little, for the merges to measure."""
    build = setting.network.load()
    torch.manual_seed(0)
    network = build()
    initial = {name: weight.clone() for name, weight in network.named_parameters()}
    for index in range(_CLIENTS):
        with torch.no_grad():
            for name, weight in network.named_parameters():
                if weight.requires_grad:
                    scale = _NOISE * initial[name].square().mean().sqrt()
                    weight.copy_(initial[name] + scale * torch.randn_like(weight))
        samples = setting.data(_MERGED_SAMPLES, seed=1 + index)
        found = extract_curvature(network, samples, progress=False)
        update = ClientUpdate.from_model(network, found.header(), found.blocks)
        update.compressed(1.0).save(folder / f"client-{index}.safetensors")
    return {"clients": _CLIENTS, "samples": _MERGED_SAMPLES}


def _merge(method: str) -> Callable[[Setting, Path], dict[str, Any]]:
    """Makes the measurement of a merge of the files that `updates` wrote."""

    def merge(setting: Setting, folder: Path) -> dict[str, Any]:
        files = sorted(folder.glob("client-*.safetensors"))
        started = time.process_time()
        result, peak = peak_memory(lambda: merge_updates(files, method=method))
        return {
            "seconds": time.process_time() - started,
            "peak_bytes": peak,
            "iterations": max(layer.iterations for layer in result.layers),
            "residual": max(layer.residual for layer in result.layers),
            "solved": result.solved,
        }

    return merge


def _peer(name: str) -> Callable[[Setting, Path], dict[str, Any]]:
    """Makes the measurement of another library on the samples that the callback used."""

    def peer(setting: Setting, folder: Path) -> dict[str, Any]:
        build = setting.network.load()
        loader = setting.data(setting.samples)

        def run() -> tuple[nn.Module, float, float]:
            network = build()
            seconds, covered = run_peer(name, network.eval(), loader)
            return network, seconds, covered

        (network, seconds, covered), peak = peak_memory(run)
        return {
            "seconds": seconds,
            "training_seconds": _Steps(setting, network).seconds(),
            "covered": covered,
            "peak_bytes": peak,
        }

    return peer


MEASUREMENTS: dict[str, Callable[[Setting, Path], dict[str, Any]]] = {
    "training": training,
    "client": client,
    "updates": updates,
    "fedavg": _merge("fedavg"),
    "fedfisher": _merge("fedfisher"),
    **{name: _peer(name) for name in PEERS},
}
"""What can be measured."""


class _Tiny(nn.Module):
    """Has a layer of each kind of backend."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.linear = nn.Parameter(torch.zeros(100)), nn.Linear(100, 100)

    def forward(self, x: Tensor) -> Any:
        return self.linear(x + self.shift)


def _warm_up() -> None:
    """Does everything once, so that code which is loaded on first use is not measured."""
    network = _Tiny()
    batch = torch.randn(4, 100), torch.arange(4)
    functional.cross_entropy(network(batch[0]), batch[1]).backward()
    torch.optim.AdamW(network.parameters()).step()
    found = extract_curvature(network, [batch], progress=False)
    update = ClientUpdate.from_model(network, found.header(4), found.blocks).compressed(1.0)
    with TemporaryDirectory() as folder:
        paths = [update.save(Path(folder) / f"{index}.safetensors") for index in range(2)]
        merge_updates(paths)


def main() -> None:
    """Measures as the command line says (what, setting as JSON, folder), and writes a JSON file."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    what, setting, folder = sys.argv[1], Setting(**json.loads(sys.argv[2])), Path(sys.argv[3])
    _warm_up()
    torch.manual_seed(0)
    try:
        measured = MEASUREMENTS[what](setting, folder)
    except Exception as error:  # a refusal is a result
        measured = {"failed": f"{type(error).__name__}: {error}"[:_FAILURE]}
    (folder / "measured.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
