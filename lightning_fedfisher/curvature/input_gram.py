"""Curvature of the inputs alone: RegMean's, which needs neither labels nor a backward pass.

K-FAC without its row factor. For a layer with many outputs that factor is what does not fit: 4 GB
for the 32,000 outputs of a language model's head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.curvature.base import Curvature, InputSide
from lightning_fedfisher.curvature.input_map import InputMap
from lightning_fedfisher.curvature.linalg import (
    PseudoInverse,
    Restriction,
    change_basis,
    frobenius_norm,
    large_eigenpairs,
    pseudo_reciprocal,
    symmetric_eigenvalues,
)
from lightning_fedfisher.curvature.powers import TensorRole


@dataclass(frozen=True, eq=False)
class InputGram(Curvature):
    """The operator ``F W = W A``: the second moment of a layer's inputs, alike for all outputs.

    (Jin et al., 2023, "Dataless Knowledge Fusion by Merging Weights of Language Models".)

    Attributes:
        column_factor: ``A``, the second moment of the inputs, of shape ``(columns, columns)``.
        rows: Number of rows of the weight matrix.

    Example:
        >>> curvature = InputGram(torch.tensor([[1.0, 0.5], [0.5, 1.0]]), rows=1)
        >>> curvature.apply(torch.tensor([[2.0, 0.0]]))
        tensor([[2., 1.]])
    """

    column_factor: Tensor
    rows: int
    kind: ClassVar[str] = "input_gram"
    tensor_roles: ClassVar[Mapping[str, TensorRole]] = {"column_factor": "factor"}
    restricts: ClassVar[bool] = True
    inputs_on: ClassVar[InputSide | None] = "columns"
    inputs_factor: ClassVar[str] = "column_factor"
    exact_inputs: ClassVar[bool] = True

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.rows, len(self.column_factor)

    @override
    def apply(self, matrix: Tensor) -> Tensor:
        return matrix @ self.column_factor

    @override
    def pseudo_inverse(self, rcond: float) -> PseudoInverse:
        values, columns = large_eigenpairs(self.column_factor, rcond)
        inverse, support = pseudo_reciprocal(values, 0.0)
        c, n = columns.shape
        return PseudoInverse(
            lambda matrix: matrix @ columns,
            lambda coordinates: coordinates @ columns.mT,
            inverse.expand(self.rows, -1),
            support.expand(self.rows, -1),
            Restriction(
                lambda curvature: curvature.within(columns),
                writing=c * n * (c + n),
                changing=2 * self.rows * c * n,
                saved=self.rows * (c * c - n * n),
            ),
        )

    def within(self, columns: Tensor) -> Self:
        """Gives the operator on coordinates in another basis of columns.

        Args:
            columns: Orthonormal columns, of shape ``(columns, n)``.

        Returns:
            The operator on matrices of shape ``(rows, n)``.
        """
        return type(self)(change_basis(self.column_factor, columns), self.rows)

    @override
    def average_over_columns(self) -> Self:
        mean = self.column_factor.diagonal().mean()
        return type(self)(mean * torch.eye(self.shape[1]).to(mean), self.rows)

    @override
    def of_inputs(self) -> Self:
        return self

    @override
    def with_inputs(self, change: InputMap) -> Self:
        transposed = change.transposed
        half = transposed.on_columns(self.column_factor)
        return type(self)(transposed.on_columns(half.mT), self.rows)

    @override
    def diagonal(self) -> Tensor:
        return self.column_factor.diagonal().expand(self.shape)

    @override
    def trace(self) -> Tensor:
        return self.rows * self.column_factor.trace().double()

    @override
    def eigenvalues(self) -> Tensor:
        return symmetric_eigenvalues(self.column_factor).expand(self.shape)

    @override
    def norm(self) -> Tensor:
        return math.sqrt(self.rows) * frobenius_norm(self.column_factor)

    @override
    def sensitivities(self) -> dict[str, float]:
        return {"column_factor": float(self.rows)}

    @classmethod
    @override
    def tensor_shapes(cls, shape: tuple[int, int], kernel: int = 1) -> dict[str, tuple[int, ...]]:
        _, columns = shape
        return {"column_factor": (columns, columns)}

    @classmethod
    @override
    def _build(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Self:
        return cls(**tensors, rows=shape[0])
