"""Merges by task vectors: what fine-tuning changed in the weights that all clients started from.

They read weights alone: no curvature, no data and no labels, so that there is nothing to tune a
scale by. Each takes the recommended one. Clients count the same, however many samples they have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

TaskVectors = Sequence[Mapping[str, Tensor]]
"""For each client what training changed in every parameter, by name."""

_SCALE = 0.4  # of task arithmetic where there is no validation set
_DENSITY = 0.2  # of what TIES keeps
_RTOL = 1e-6  # of singular values that count as zero


def linear_weights(network: nn.Module) -> set[str]:
    """Names the matrices of linear layers, of attention, and of convolutions that are not grouped.

    Args:
        network: any network. Matrices of other modules count as no matrix.
    """
    found = set()
    for path, module in network.named_modules():
        convolves = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1
        if isinstance(module, nn.Linear) or convolves:
            found.add(f"{path}.weight".removeprefix("."))
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            found.add(f"{path}.in_proj_weight".removeprefix("."))
    return found


def task_arithmetic(vectors: TaskVectors, linear: set[str]) -> dict[str, Tensor]:
    """Adds up all task vectors, scaled by 0.4 (Ilharco et al., 2023, "Editing Models")."""
    return {name: _SCALE * sum(_all(vectors, name)) for name in vectors[0]}


def ties(vectors: TaskVectors, linear: set[str]) -> dict[str, Tensor]:
    """Averages what agrees in sign, of the largest fifth of each vector (Yadav et al., 2023)."""
    kept = []
    for vector in vectors:
        sizes = torch.cat([tensor.abs().flatten() for tensor in vector.values()])
        count = max(round(_DENSITY * len(sizes)), 1)
        least = sizes.kthvalue(len(sizes) - count + 1).values
        kept.append({n: t.where(t.abs() >= least, 0.0) for n, t in vector.items()})
    merged = {}
    for name in vectors[0]:
        stacked = torch.stack(_all(kept, name))
        agrees = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
        merged[name] = stacked.where(agrees, 0.0).sum(0) / agrees.sum(0).clamp_min(1)
    return merged


def tsv(vectors: TaskVectors, linear: set[str]) -> dict[str, Tensor]:
    """Adds up the leading singular vectors of each client, made orthogonal between clients.

    TSV-M of Gargiulo et al., 2025, "Task Singular Vectors". Of each matrix a client has its share
    of the rank; where there are more clients than rank, and in what is no matrix, task vectors are
    averaged.
    """
    return _matrix_by_matrix(vectors, linear, _tsv)


def actmat(vectors: TaskVectors, linear: set[str]) -> dict[str, Tensor]:
    """RegMean with the second moment of inputs guessed from the task vector: ``D'D`` of a matrix.

    ACTMat (arXiv 2604.01329). What is no matrix is averaged.
    """
    return _matrix_by_matrix(vectors, linear, _actmat)


Peer: TypeAlias = Callable[[TaskVectors, set[str]], dict[str, Tensor]]
"""From task vectors and the names of matrices to what is added to the weights at the start."""

PEERS: dict[str, Peer] = {
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "tsv": tsv,
    "actmat": actmat,
}
"""Each by the name of its method."""


def merge_by_task_vectors(
    method: str, network: nn.Module, clients: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Merges clients that were fine-tuned from one network.

    Args:
        method: one of `PEERS`.
        network: with the weights that all clients started from; it is not changed.
        clients: the parameters of each, by the network's names.

    Returns:
        The merged parameters.
    """
    start = {name: weight.detach() for name, weight in network.named_parameters()}
    vectors = [{n: t.float() - start[n].float() for n, t in client.items()} for client in clients]
    changes = PEERS[method](vectors, linear_weights(network))
    return {name: (start[name] + change).to(start[name]) for name, change in changes.items()}


def _all(vectors: TaskVectors, name: str) -> list[Tensor]:
    """What each client changed in one parameter."""
    return [vector[name] for vector in vectors]


def _matrix_by_matrix(
    vectors: TaskVectors, linear: set[str], merge: Callable[[list[Tensor]], Tensor]
) -> dict[str, Tensor]:
    """Merges each matrix by itself, and averages what is none."""
    merged = {}
    for name, first in vectors[0].items():
        changes = _all(vectors, name)
        if name in linear:
            merged[name] = merge([c.flatten(1) for c in changes]).view_as(first).to(first)
        else:
            merged[name] = torch.stack(changes).mean(0)
    return merged


def _tsv(changes: list[Tensor]) -> Tensor:
    """Merges what clients changed in one matrix."""
    rank = min(changes[0].shape) // len(changes)
    # Of a client that changed nothing, singular vectors would be anything.
    parts = [torch.linalg.svd(c, full_matrices=False) for c in changes if c.any()]
    if rank == 0 or not parts:
        return torch.stack(changes).mean(0)
    outputs = _orthogonal(torch.cat([u[:, :rank] for u, _, _ in parts], dim=1))
    inputs = _orthogonal(torch.cat([v[:rank] for _, _, v in parts]))
    return (outputs * torch.cat([s[:rank] for _, s, _ in parts])) @ inputs


def _actmat(changes: list[Tensor]) -> Tensor:
    """Merges what clients changed in one matrix, in float64."""
    doubled = [change.double() for change in changes]
    values, basis = _right_singular(torch.cat(doubled))
    right = sum(change @ (change.mT @ (change @ basis.mT)) for change in doubled)
    merged: Tensor = (right / values.square()) @ basis
    return merged


def _right_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values that are not zero, and right singular vectors in rows, by the smaller Gram.

    A decomposition of the matrix itself takes minutes for the filters of a ResNet18.
    """
    rows, columns = matrix.shape
    squares, vectors = torch.linalg.eigh(
        matrix @ matrix.mT if rows < columns else matrix.mT @ matrix
    )
    seen = squares > _RTOL**2 * squares[-1]
    values, vectors = squares[seen].sqrt(), vectors[:, seen]
    return values, (vectors / values).mT @ matrix if rows < columns else vectors.mT


def _orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns (Procrustes)."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right
