"""Clients' updates, and merges on a silent Trainer: whole, stopped half way, and resumed."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import torch
from helpers.federation import quiet_trainer, tiny_updates
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_fedfisher import METHODS, ClientUpdate, FisherMergeModule, extract_curvature

# All but those that merge fits of a single layer.
OF_NETWORKS = [name for name, row in METHODS.items() if not row.takes_fits]
METHOD_OPTIONS = {  # what a client extracts for each method: curvature and Fisher type
    "fedavg": ("identity", "exact"),
    "fisher_merge": ("diagonal", "exact"),
    "regmean": ("kfac", "normalised"),
    "fedfisher_diag": ("diagonal", "exact"),
    "fedfisher_kfac": ("kfac", "exact"),
    "fedfisher": ("kfac", "normalised"),
}


def updates_by_method(root: Path, methods=tuple(METHOD_OPTIONS)) -> dict[str, list[ClientUpdate]]:
    """Three clients' updates for each method; methods that need the same share them."""
    trained = {
        (curvature, fisher): tiny_updates(
            root / f"{curvature}-{fisher}", curvature=curvature, fisher=fisher
        )
        for curvature, fisher in dict.fromkeys(METHOD_OPTIONS[method] for method in methods)
    }
    return {method: trained[METHOD_OPTIONS[method]] for method in methods}


def updates_by_curvature(root: Path, *curvatures: str) -> dict[str, list[ClientUpdate]]:
    """Three clients' updates with each kind of curvature, and the same weights."""
    return {kind: tiny_updates(root / kind, curvature=kind) for kind in curvatures}


def update_of(
    model: nn.Module, data: Dataset, curvature: str = "diagonal", num_samples: int | None = None
) -> ClientUpdate:
    """The update of a model as it is, in memory."""
    loader = DataLoader(data, batch_size=10)
    extracted = extract_curvature(
        model, loader, curvature, max_samples=None, positions=None, progress=False
    )
    return ClientUpdate.from_model(model, extracted.header(num_samples), extracted.blocks)


def small_classifier(
    activation: type[nn.Module] = nn.Tanh, seed: int = 0, bias: bool = True
) -> nn.Sequential:
    """Layers ``0`` and ``2``, of which the second is aligned if the activation is a ReLU."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 4), activation(), nn.Linear(4, 3, bias=bias))


def small_data(seed: int = 0, samples: int = 30) -> TensorDataset:
    """Labelled inputs of the small classifier."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 5, generator=generator) + 1
    return TensorDataset(x, torch.randint(0, 3, (samples,), generator=generator))


def merge(updates, root, val=None, trainer=(), **options) -> FisherMergeModule:
    module = FisherMergeModule(updates, **options)
    quiet_trainer(root, **{"max_epochs": -1} | dict(trainer)).fit(module, val_dataloaders=val)
    return module


def interrupted(clients, root, epochs, val=None, **options) -> tuple[FisherMergeModule, str]:
    """A merge that was stopped after some sweeps, and its checkpoint."""
    checkpoint = ModelCheckpoint(root / "kept", save_last=True)
    trainer = {"callbacks": [checkpoint], "enable_checkpointing": True, "max_epochs": epochs}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*has not converged")
        module = merge(clients, root, val, trainer=trainer, **options)
    return module, checkpoint.last_model_path


def resumed(path, clients, root, val=None, **options) -> FisherMergeModule:
    module = FisherMergeModule(clients, **options)
    quiet_trainer(root, max_epochs=-1).fit(
        module, val_dataloaders=val, ckpt_path=path, weights_only=True
    )
    return module


def with_header(update: ClientUpdate, **changes) -> ClientUpdate:
    """The same update in memory with another header."""
    tensors = {f"parameters/{name}": tensor for name, tensor in update.parameters.items()}
    tensors |= {f"buffers/{name}": tensor for name, tensor in update.buffers.items()}
    for name, block in update.blocks.items():
        tensors |= {f"curvature/{name}/{part}": t for part, t in block.tensors().items()}
    return ClientUpdate(dataclasses.replace(update.header, **changes), tensors, update.source)


def assert_same(state, other, **tolerances) -> None:
    """Whether two models' states are of the same names and values."""
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, other[name], **tolerances)
