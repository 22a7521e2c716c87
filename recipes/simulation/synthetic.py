"""Makes updates of clients that never trained, to measure a server with many of them."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_fedfisher import ClientUpdate, extract_curvature
from lightning_fedfisher.curvature.kronecker import Kronecker

_NOISE = 0.3  # standard deviation, in multiples of that of the weights
_ROWS = 256  # samples behind each factor
_FLOOR = 0.01  # least eigenvalue, in mean ones


def synthetic_update(model: nn.Module, images: Tensor) -> ClientUpdate:
    """Makes an update of an untrained network, with K-FAC factors of random samples.

    Args:
        model: a network without biases or normalisation, as all in `simulation.models`.
        images: a few images that the network takes, from which the order of its layers is read.

    Returns:
        The update.
    """
    labels = torch.zeros(len(images), dtype=torch.long)
    seen = extract_curvature(model, [(images, labels)], "diagonal", progress=False)
    layers = seen.layers
    header = dataclasses.replace(
        seen.header(1000),
        curvature="kfac",
        curvature_samples=_ROWS,
        kinds={layer.name: Kronecker.kind for layer in layers},
    )
    generator = torch.Generator().manual_seed(0)
    # Eigenvalues fall with their rank, as those of trained networks do.
    scales = 1 / torch.arange(1, _ROWS + 1).sqrt()

    def factor(size: int) -> Tensor:
        rows = scales.unsqueeze(1) * torch.randn(_ROWS, size, generator=generator)
        moments = rows.mT @ rows / _ROWS
        # Of full rank: directions that few clients know would slow the solver more than those of
        # trained clients do.
        moments.diagonal().add_(_FLOOR * moments.trace() / size)
        return (moments + moments.mT) / 2  # a product is symmetric only up to rounding

    blocks = {layer.name: Kronecker(*map(factor, layer.shape)) for layer in layers}
    return ClientUpdate.from_model(model, header, blocks)


def perturbed(update: ClientUpdate, seed: int) -> ClientUpdate:
    """Makes another client's update, which differs in every number of weights and curvature.

    Args:
        update: an update with K-FAC curvature.
        seed: tells the other client from further ones.

    Returns:
        An update with noise on its weights, and with factors ``D M D`` for a random diagonal ``D``,
        which keeps them symmetric and positive semi-definite.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return _NOISE * torch.randn(*shape, generator=generator)

    def congruent(factor: Tensor) -> Tensor:
        scales = normal(len(factor)).exp()
        # In this order: an outer product is symmetric to the last bit.
        return torch.outer(scales, scales) * factor

    tensors = {f"buffers/{name}": buffer for name, buffer in update.buffers.items()}
    for name, weight in update.parameters.items():
        tensors[f"parameters/{name}"] = weight + weight.std() * normal(*weight.shape)
    for name, block in update.blocks.items():
        for part, factor in block.tensors().items():
            tensors[f"curvature/{name}/{part}"] = congruent(factor)
    samples = round(update.num_samples * math.exp(normal(1).item()))
    samples = max(samples, update.header.curvature_samples)
    header = dataclasses.replace(update.header, num_samples=samples, normalized={})
    return ClientUpdate(header, tensors)


def write_perturbed(first: Callable[[], ClientUpdate], folder: Path, clients: int) -> list[Path]:
    """Writes an update and perturbed copies of it, those that are not there yet.

    Args:
        first: makes the update.
        folder: where the files go.
        clients: number of files in all.

    Returns:
        The files, sorted by name.

    Raises:
        OSError: if the files do not fit on the disk.
    """
    paths = [folder / f"client-{index:04d}.safetensors" for index in range(clients)]
    missing = [index for index, path in enumerate(paths) if not path.is_file()]
    if not missing:
        return paths
    update = first()
    written = update.save(paths[0])
    needed = len(missing) * written.stat().st_size
    if needed > shutil.disk_usage(folder).free:
        raise OSError(f"{folder} lacks room for {needed / 1e9:.1f} GB of updates")
    for index in missing:
        if index > 0:
            perturbed(update, index).save(paths[index])
    return paths
