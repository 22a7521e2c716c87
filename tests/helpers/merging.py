"""Merges on a silent Trainer: whole, stopped half way, and resumed."""

from __future__ import annotations

import dataclasses
import warnings

import torch
from helpers.federation import quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_fedfisher import ClientUpdate, FisherMergeModule


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
