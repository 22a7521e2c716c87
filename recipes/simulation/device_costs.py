"""What a large network costs on a device, and how far its curvature there is from the CPU's.

The CPU extracts from few samples, since it takes minutes for what a GPU does in a second. All that
is timed runs on the device alone, but for the packing, which is the processor's work anyway.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher import ClientUpdate, extract_curvature, merge_updates
from simulation.device_steps import CPU, Tensors, applied, relative_differences, worst
from simulation.memory import peak_device_memory
from simulation.real_models import RealModel
from simulation.timing import timed

STEPS = ("difference", "training", "extraction", "packing", "merge")
"""What there is to measure, in the order in which one needs another."""

_COMPARED_SAMPLES, _COMPARED_BATCH = 8, 4
_CLIENTS = 2
_NOISE = 0.01  # of a client's weights, relative to their root mean square
_WARM_UP, _TRAINING_STEPS = 2, 5

Measured = dict[str, Any]


class DeviceCosts:
    """Measures one network. Each method is a step, and gives fields of the network's row."""

    def __init__(
        self, model: RealModel, samples: int, batch_size: int, device: torch.device
    ) -> None:
        """Builds the network.

        Args:
            model: the network and its data.
            samples: of each client.
            batch_size: samples in a batch, of training and of extraction.
            device: that does the work.

        Raises:
            ImportError: if the network's package is not installed.
        """
        build = model.load()
        torch.manual_seed(0)
        self._network = build()
        self._model, self._samples, self._batch_size = model, samples, batch_size
        self._device = device
        self._updates: list[ClientUpdate] = []

    def difference(self) -> Measured:
        """Extracts from a few samples on the CPU and on the device.

        Returns:
            The largest relative difference of any layer's curvature, and which layer that is.
        """
        loader = self._data(_COMPARED_SAMPLES, seed=0, batch_size=_COMPARED_BATCH)

        def extracted(device: torch.device) -> Tensors:
            network = copy.deepcopy(self._network).to(device)
            # All positions: a block of few would show where rounding flips a single ReLU, and one
            # of a ViT's last layers is zero if no class token is among them.
            found = extract_curvature(network, loader, positions=None, progress=False)
            return applied(found.blocks)

        with exact_convolutions():
            differences = relative_differences(extracted(CPU), extracted(self._device))
        largest = worst(differences)
        return {
            "parameters": sum(weight.numel() for weight in self._network.parameters()),
            "relative_difference": differences[largest],
            "in_layer": largest,
        }

    def training(self) -> Measured:
        """Makes training steps, of which the shortest counts.

        Returns:
            Seconds of a step for each of its samples, and peak memory.
        """
        loader = self._data(self._batch_size, seed=0)
        x, y = (tensor.to(self._device) for tensor in next(iter(loader)))

        def train() -> float:
            network = copy.deepcopy(self._network).to(self._device).train()
            optimizer = self._model.make_optimizer(network.parameters())

            def step() -> None:
                optimizer.zero_grad()
                functional.cross_entropy(network(x), y).backward()
                optimizer.step()

            timed(step, _WARM_UP, self._device)
            return timed(step, _TRAINING_STEPS, self._device)[1] / len(x)

        seconds, peak = peak_device_memory(train, self._device)
        return {"training_seconds": seconds, "training_bytes": peak}

    def extraction(self) -> Measured:
        """Extracts from each client's samples with the default options.

        Returns:
            Seconds of the faster client, how many samples that took, and peak memory.
        """

        def extract() -> list[float]:
            return [self._extract(client) for client in range(_CLIENTS)]

        seconds, peak = peak_device_memory(extract, self._device)
        return {
            "extraction_seconds": min(seconds),  # the first one may pay for what is done once
            "curvature_samples": self._updates[0].header.curvature_samples,
            "extraction_bytes": peak,
        }

    def packing(self) -> Measured:
        """Rounds an update as the callback does by default; needs `extraction` to have run.

        Returns:
            Seconds, and bytes as sent beside those that FedAvg would send.
        """
        update = self._updates[0]
        packed, seconds = timed(lambda: update.compressed(1.0), 1)
        return {
            "packing_seconds": seconds,
            "upload_bytes": packed.upload_bytes,
            "fedavg_bytes": update.fedavg_bytes,
        }

    def merge(self) -> Measured:
        """Merges the clients with the default method; needs `extraction` to have run.

        Their updates are in memory and not packed, so that no time goes into unpacking them.

        Returns:
            Seconds, peak memory, and how the solver fared.
        """

        def merge() -> Any:
            return timed(lambda: merge_updates(self._updates, device=self._device), 1, self._device)

        (result, seconds), peak = peak_device_memory(merge, self._device)
        return {
            "merge_seconds": seconds,
            "merge_bytes": peak,
            "iterations": max(layer.iterations for layer in result.layers),
            "solved": result.solved,
        }

    def _extract(self, client: int) -> float:
        """Extracts from one client's samples, keeps its update, and gives the seconds."""
        network = self._client(client).to(self._device)
        loader = self._data(self._samples, seed=1 + client)
        found, seconds = timed(
            lambda: extract_curvature(network, loader, progress=False), 1, self._device
        )
        self._updates.append(ClientUpdate.from_model(network, found.header(), found.blocks))
        return seconds

    @torch.no_grad()
    def _client(self, seed: int) -> nn.Module:
        """Makes a network whose weights are near those of all clients."""
        network, generator = copy.deepcopy(self._network), torch.Generator().manual_seed(seed)
        for weight in network.parameters():
            scale = _NOISE * weight.square().mean().sqrt()
            weight += scale * torch.randn(weight.shape, generator=generator)
        return network

    def _data(self, samples: int, seed: int, batch_size: int | None = None) -> DataLoader[Any]:
        """Draws samples."""
        drawn = self._model.draw(samples, torch.Generator().manual_seed(seed))
        return DataLoader(TensorDataset(*drawn), batch_size or self._batch_size)


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Has a GPU's convolutions keep all digits; by default they round to 10 bits.

    Yields:
        None.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
