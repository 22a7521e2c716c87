"""The work that `gpu_check.py` does on each device: callback, extraction and merge."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher import ClientUpdate, FedFisherCallback, extract_curvature
from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.extraction.extract import extract_curvatures
from lightning_fedfisher.extraction.layer_report import CurvatureType
from simulation.clients import QUIET, Classifier, merge
from simulation.models import build_model

CPU = torch.device("cpu")
_KINDS: tuple[CurvatureType, ...] = ("kfac", "ekfac", "diagonal")
_CLIENTS = 3
_SPREAD = 0.1  # of the clients' weights around the first client's, relative to their size

Tensors = dict[str, Tensor]


class DeviceSteps:
    """The three steps for one network, each of which gives tensors to compare."""

    def __init__(self, model: str, samples: int, batch_size: int, folder: Path) -> None:
        """Makes a network and random data.

        Args:
            model: name of the network.
            samples: number of images.
            batch_size: images in a batch.
            folder: for update files.
        """
        torch.manual_seed(0)
        self._model = Classifier(build_model(model, 3, 32, 10), learning_rate=0.0)
        data = TensorDataset(torch.randn(samples, 3, 32, 32), torch.randint(0, 10, (samples,)))
        self._loader = DataLoader(data, batch_size=batch_size)
        self._folder, self._files = folder, list[Path]()

    def callback(self, device: torch.device) -> Tensors:
        """Trains for an epoch at learning rate 0, and reads the update that the callback wrote.

        Args:
            device: that trains and extracts.

        Returns:
            The curvature of each layer, applied to a random matrix.
        """
        path = self._folder / "callback.safetensors"
        # Whole, since rounding to a budget would hide small differences or enlarge them.
        callback = FedFisherCallback(path, max_samples=None, upload_budget=None)
        options = QUIET | {"accelerator": _accelerator(device), "callbacks": [callback]}
        Trainer(max_epochs=1, **options).fit(self._model, self._loader)
        return applied(ClientUpdate.open(path).blocks)

    def extraction(self, device: torch.device) -> Tensors:
        """Extracts every kind of curvature with the exact Fisher.

        Args:
            device: that extracts.

        Returns:
            Each kind of each layer, applied to a random matrix.
        """
        model = self._model.to(device)
        found = extract_curvatures(
            model,
            self._loader,
            _KINDS,
            fisher="exact",
            tolerance=0.0,
            max_samples=None,
            progress=False,
        )
        self._model.to(CPU)
        return {
            f"{kind}/{name}": tensor
            for kind, extracted in found.items()
            for name, tensor in applied(extracted.blocks).items()
        }

    def merge(self, device: torch.device) -> Tensors:
        """Merges three clients, whose updates come from the CPU, with the default method.

        Args:
            device: that merges.

        Returns:
            The merged state dict.
        """
        self._files = self._files or [self._write_client(seed) for seed in range(_CLIENTS)]
        options = QUIET | {"accelerator": _accelerator(device)}
        return merge("fedfisher", self._files, None, None, options).state_dict

    def _write_client(self, seed: int) -> Path:
        """Writes the update of a client whose weights are near those of the network."""
        client, generator = copy.deepcopy(self._model), torch.Generator().manual_seed(seed)
        for weight in client.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.data += _SPREAD * weight.std() * noise
        found = extract_curvature(client, self._loader, max_samples=None, progress=False)
        update = ClientUpdate.from_model(client, found.header(), found.blocks)
        return update.save(self._folder / f"client-{seed}.safetensors")


def _accelerator(device: torch.device) -> str:
    """Lightning's name for a kind of device."""
    return "gpu" if device.type == "cuda" else "cpu"


def applied(blocks: Mapping[str, Curvature]) -> Tensors:
    """Applies each layer's curvature to a random matrix (eigenvectors themselves have no sign).

    Args:
        blocks: the curvature of each layer, by name.

    Returns:
        Tensors on the CPU, by the same names.
    """
    generator = torch.Generator().manual_seed(1)
    probes = {
        name: torch.randn(*block.shape, generator=generator) for name, block in blocks.items()
    }
    return {
        name: block.to(CPU, torch.float32).apply(probes[name]) for name, block in blocks.items()
    }


def relative_differences(expected: Tensors, found: Tensors) -> dict[str, float]:
    """Compares tensors by name.

    Args:
        expected: tensors from the CPU.
        found: the same from another device.

    Returns:
        The relative difference (Frobenius norm) of each tensor; nan if either is.
    """
    return {
        name: float((found[name].cpu() - tensor).norm() / tensor.norm())
        for name, tensor in expected.items()
    }


def worst(differences: Mapping[str, float]) -> str:
    """Finds the largest difference.

    Args:
        differences: by name.

    Returns:
        Its name; of those that are nan the first, if there are any.
    """
    return max(differences, key=lambda name: (math.isnan(differences[name]), differences[name]))


def relative_difference(expected: Tensors, found: Tensors) -> float:
    """Compares tensors by name.

    Args:
        expected: tensors from the CPU.
        found: the same from another device.

    Returns:
        The largest relative difference (Frobenius norm) of any tensor; nan if any is.
    """
    differences = relative_differences(expected, found)
    return differences[worst(differences)]
