"""Studies how small an upload may be: accuracy of the default merge by the bytes a client sends.

Trains the clients of several federations once (and keeps them), extracts what the callback does by
default, and merges the updates as they are, compressed to several budgets, and truncated as the
FedFisher paper does. Started again, it goes on where it was interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jsonargparse import ArgumentParser
from simulation.clients import QUIET, merge
from simulation.data import ImageData
from simulation.federations import MERGE_FEDERATIONS, Federation
from simulation.study import (
    Client,
    default_update,
    initial_network,
    run_study,
    scores_of,
    study_parser,
)
from torch import Tensor

from lightning_fedfisher import ClientUpdate

PLAIN, PUBLISHED = "as it is", "published truncation"
BUDGETS = {f"budget {budget:g}": budget for budget in (0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5)}
FEDERATIONS = {
    "development": [
        *MERGE_FEDERATIONS["seeds"],
        *(Federation("imagefolder", "cnn", 0.1, 3, seed) for seed in range(3)),
    ],
    "held-out": MERGE_FEDERATIONS["held-out"],
    "resnet18": [Federation("fashionmnist", "resnet18", 0.1, 3, seed) for seed in range(3)],
}
_WEIGHT_BITS, _FACTOR_BITS = 16, 9  # of the published truncation


@dataclass(frozen=True)
class Row(Federation):
    """A result: means over clients, accuracy in percent, seconds of one client."""

    sent: str
    upload: float
    accuracy: float
    nll: float
    extraction_seconds: float
    packing_seconds: float


def truncated(update: ClientUpdate) -> tuple[ClientUpdate, float]:
    """Truncates an update to about the bits of float32 weights, as FedFisher does.

    See arXiv 2403.12329. Weights take 16 bits. Of each factor, the leading singular triples are
    kept at 9 bits an entry: the same number of triples for all factors, as many as there is room
    for. Bits are counted, as published; no file holds them.

    Args:
        update: with K-FAC factors.

    Returns:
        The update that a server would read, with the nearest symmetric positive semi-definite
        factors, and the bytes that were sent.
    """
    weights = sum(tensor.numel() for tensor in update.parameters.values())
    factors = {
        f"curvature/{name}/{part}": tensor
        for name, block in update.blocks.items()
        for part, tensor in block.tensors().items()
    }

    def bits(rank: int) -> int:
        triples = sum(min(rank, len(f)) * (2 * len(f) + 1) for f in factors.values())
        return _WEIGHT_BITS * weights + _FACTOR_BITS * triples

    rank = 1
    while rank < max(map(len, factors.values())) and bits(rank + 1) <= 32 * weights:
        rank += 1
    tensors = {f"buffers/{name}": tensor for name, tensor in update.buffers.items()}
    for name, tensor in update.parameters.items():
        tensors[f"parameters/{name}"] = _uniform(tensor, _WEIGHT_BITS)
    for name, factor in factors.items():
        u, s, v = (_uniform(part, _FACTOR_BITS) for part in torch.linalg.svd(factor))
        kept = (u[:, :rank] * s[:rank]) @ v[:rank]
        values, vectors = torch.linalg.eigh((kept + kept.mT).double() / 2)
        nearest = (vectors * values.clamp_min(0)) @ vectors.mT
        tensors[name] = ((nearest + nearest.mT) / 2).to(factor.dtype)
    return ClientUpdate(update.header, tensors), bits(rank) / 8


def _uniform(tensor: Tensor, bits: int) -> Tensor:
    """Rounds to integers of so many bits, scaled by the largest magnitude."""
    steps = 2 ** (bits - 1) - 1
    scale = tensor.abs().max().clamp_min(torch.finfo(tensor.dtype).tiny)
    return (tensor / scale * steps).round() * scale / steps


def run_budgets(
    federation: Federation,
    clients: Sequence[Client],
    images: ImageData,
    settings: Sequence[tuple[str, ...]],
) -> Iterator[Row]:
    """Merges the updates of one federation at one size after the other, and tests the models.

    Args:
        federation: what the clients were trained as.
        clients: trained networks and their samples.
        images: the data set, for its test set.
        settings: the sizes, as keys of `BUDGETS`, `PLAIN` or `PUBLISHED`.

    Yields:
        A result for each setting.
    """
    updates, extraction = [], 0.0
    for client in clients:
        update, seconds = default_update(client)
        extraction += seconds / len(clients)
        updates.append(update)
    for (sent,) in settings:
        with TemporaryDirectory() as folder:
            sizes, packing, arrived = [], 0.0, []
            for index, update in enumerate(updates):
                path = Path(folder) / f"{index}.safetensors"
                started = time.perf_counter()
                if sent == PUBLISHED:
                    update, size = truncated(update)
                    update.save(path)
                else:
                    (update if sent == PLAIN else update.compressed(BUDGETS[sent])).save(path)
                    size = path.stat().st_size
                packing += (time.perf_counter() - started) / len(updates)
                sizes.append(size / update.fedavg_bytes)
                arrived.append(path)
            network = initial_network(federation, images)
            merge("fedfisher", arrived, network, None, QUIET)
        scores = scores_of(network, images)
        upload = math.fsum(sizes) / len(sizes)
        yield Row(*astuple(federation), sent, upload, *scores, extraction, packing)


def make_parser() -> ArgumentParser:
    """Describes the command line.

    Returns:
        The parser.
    """
    return study_parser("compression_study", __doc__, FEDERATIONS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study from the command line.

    Args:
        arguments: of the command line; None reads `sys.argv`.
    """
    flags = make_parser().parse_args(arguments)
    names = [PLAIN, "budget 1"]
    if flags.federations != "resnet18":  # whose merge takes a quarter of an hour
        names = [PLAIN, *BUDGETS, PUBLISHED]
    run_study(flags, FEDERATIONS, [(name,) for name in names], Row, run_budgets)


if __name__ == "__main__":
    main()
