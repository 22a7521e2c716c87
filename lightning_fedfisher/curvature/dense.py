"""Curvature written out as a full matrix, for tiny layers, theory and tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.curvature.linalg import (
    PseudoInverse,
    frobenius_norm,
    pseudo_reciprocal,
    symmetric_eigendecomposition,
    symmetric_eigenvalues,
)
from lightning_fedfisher.curvature.powers import TensorRole


@dataclass(frozen=True, eq=False)
class Dense(Curvature):
    """The full matrix ``F`` of a layer, which every other kind approximates.

    Attributes:
        matrix: A tensor of shape ``(rows * columns, rows * columns)``, which acts on the weights
            flattened row by row.
        size: Shape ``(rows, columns)`` of the weight matrix.

    Example:
        >>> curvature = Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), size=(1, 2))
        >>> curvature.apply(torch.tensor([[1.0, 0.0]]))
        tensor([[2., 1.]])
    """

    matrix: Tensor
    size: tuple[int, int]
    kind: ClassVar[str] = "dense"
    tensor_roles: ClassVar[Mapping[str, TensorRole]] = {"matrix": "factor"}

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.size

    @override
    def apply(self, matrix: Tensor) -> Tensor:
        return (self.matrix @ matrix.flatten()).view(self.size)

    @override
    def pseudo_inverse(self, rcond: float) -> PseudoInverse:
        values, basis = symmetric_eigendecomposition(self.matrix)
        return PseudoInverse(
            lambda matrix: basis.mT @ matrix.flatten(),
            lambda coordinates: (basis @ coordinates).view(self.size),
            *pseudo_reciprocal(values, rcond),
        )

    @override
    def average_over_columns(self) -> Dense:
        rows, columns = self.size
        blocks = self.matrix.view(rows, columns, rows, columns)
        partial = blocks.diagonal(dim1=1, dim2=3).mean(-1)
        return Dense(torch.kron(partial, torch.eye(columns).to(partial)), self.size)

    @override
    def eigenvalues(self) -> Tensor:
        return symmetric_eigenvalues(self.matrix).view(self.size)

    @override
    def norm(self) -> Tensor:
        return frobenius_norm(self.matrix)

    @override
    def diagonal(self) -> Tensor:
        return self.matrix.diagonal().reshape(self.size)

    @override
    def sensitivities(self) -> dict[str, float]:
        return {"matrix": 1.0}

    @classmethod
    @override
    def tensor_shapes(cls, shape: tuple[int, int], kernel: int = 1) -> dict[str, tuple[int, ...]]:
        entries = shape[0] * shape[1]
        return {"matrix": (entries, entries)}

    @classmethod
    @override
    def _build(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Self:
        return cls(tensors["matrix"], shape)
