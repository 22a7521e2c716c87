"""A small world for the tests: a classifier, clients' data, and a silent Trainer."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher import ClientUpdate, FedFisherCallback


class TinyClassifier(LightningModule):
    """Two convolutions and two linear layers, three classes."""

    def __init__(self, learning_rate: float = 0.05, bias: bool = True):
        super().__init__()
        self.learning_rate = learning_rate
        self.network = nn.Sequential(
            nn.Conv2d(1, 3, 3, stride=2, padding=1, bias=bias),
            nn.ReLU(inplace=True),
            nn.Conv2d(3, 4, 3, bias=bias),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16, 6, bias=bias),
            nn.Tanh(),
            nn.Linear(6, 3, bias=bias),
        )

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


class NormedClassifier(TinyClassifier):
    """The same with batch normalisation, whose running statistics differ by process."""

    def __init__(self, learning_rate: float = 0.05):
        super().__init__(learning_rate)
        self.network[3] = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())


def tiny_data(seed: int = 0, samples: int = 21) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (samples,), generator=generator)
    x = torch.randn(samples, 1, 8, 8, generator=generator) + y.view(-1, 1, 1, 1) - 1
    return TensorDataset(x, y)


def tiny_loader(seed: int = 0, samples: int = 21, **options) -> DataLoader:
    return DataLoader(tiny_data(seed, samples), **{"batch_size": 8, "shuffle": True} | options)


def tiny_model(seed: int = 0, **options) -> TinyClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyClassifier(**options)


def quiet_trainer(root: Path, **options) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "default_root_dir": root,
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
        }
        | options
    )


def tiny_updates(root: Path, clients: int = 3, epochs: int = 3, **options) -> list[ClientUpdate]:
    """Updates of clients that start from one initialisation and hold unlike data."""
    updates = []
    for client in range(clients):
        callback = FedFisherCallback(root / f"client-{client}.safetensors", **options)
        trainer = quiet_trainer(root, max_epochs=epochs, callbacks=[callback])
        with torch.random.fork_rng():  # the loader shuffles
            torch.manual_seed(client)
            trainer.fit(tiny_model(), tiny_loader(seed=client, samples=20 + 10 * client))
        updates.append(callback.update)
    return updates
