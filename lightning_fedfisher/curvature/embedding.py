"""K-FAC and EKFAC of embeddings, whose factor over tokens is diagonal.

The matrix of an embedding has a row for each token. One position reads one token, so the second
moment of the inputs is diagonal, and is stored as a vector: a matrix with as many rows and columns
as there are tokens would fit into no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.curvature.base import InputSide
from lightning_fedfisher.curvature.kronecker import Eigenbased, Factored
from lightning_fedfisher.curvature.linalg import (
    PseudoInverse,
    Restriction,
    change_basis,
    frobenius_norm,
    large_eigenpairs,
    pseudo_reciprocal,
    symmetric_eigendecomposition,
    symmetric_eigenvalues,
    zero_small_values,
)
from lightning_fedfisher.curvature.powers import TensorRole

# A part of the tokens: where a client's data holds no more, the others are left out of products.
_MOST_SEEN = 0.8


@dataclass(frozen=True, eq=False)
class EmbeddingKronecker(Factored):
    """The operator ``F W = diag(t) W G``: K-FAC of an embedding.

    Attributes:
        row_values: ``t``, the frequency of each token at a position, of shape ``(rows,)``.
        column_factor: ``G``, the second moment of the gradients at the embedding's output, of shape
            ``(columns, columns)``.

    Example:
        >>> curvature = EmbeddingKronecker(torch.tensor([0.25, 0.75]), 2 * torch.eye(1))
        >>> curvature.apply(torch.ones(2, 1))
        tensor([[0.5000],
                [1.5000]])
    """

    row_values: Tensor
    column_factor: Tensor
    kind: ClassVar[str] = "embedding_kronecker"
    restricts: ClassVar[bool] = True
    outputs_factor: ClassVar[str] = "column_factor"
    inputs_on: ClassVar[InputSide | None] = "rows"
    tensor_roles: ClassVar[Mapping[str, TensorRole]] = {
        "row_values": "values",
        "column_factor": "factor",
    }

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.row_values.shape[0], self.column_factor.shape[0]

    @override
    def apply(self, matrix: Tensor) -> Tensor:
        some = self._seen
        if len(some) > _MOST_SEEN * len(self.row_values):
            return self.row_values.unsqueeze(1) * (matrix @ self.column_factor)
        rows = self.row_values[some].unsqueeze(1) * (matrix[some] @ self.column_factor)
        return torch.zeros_like(matrix).index_copy_(0, some, rows)

    @cached_property
    def _seen(self) -> Tensor:
        """Indices of the tokens that the client's data holds."""
        return self.row_values.nonzero().squeeze(1)

    @override
    def diagonal(self) -> Tensor:
        return torch.outer(self.row_values, self.column_factor.diagonal())

    @override
    def sensitivities(self) -> dict[str, float]:
        outputs, inputs = self.row_values.sum(), self.column_factor.trace()
        return {"row_values": float(inputs), "column_factor": float(outputs)}

    @classmethod
    @override
    def tensor_shapes(cls, shape: tuple[int, int], kernel: int = 1) -> dict[str, tuple[int, ...]]:
        rows, columns = shape
        return {"row_values": (rows,), "column_factor": (columns, columns)}

    @override
    def eigendecompose(self, rcond: float = 0.0) -> EmbeddingEigenKronecker:
        values, basis = symmetric_eigendecomposition(self.column_factor)
        spectrum = torch.outer(
            zero_small_values(self.row_values, rcond), zero_small_values(values, rcond)
        )
        return EmbeddingEigenKronecker(basis, spectrum)

    @override
    def pseudo_inverse(self, rcond: float) -> PseudoInverse:
        # Coordinates are those of tokens that some client has seen.
        seen = (self.row_values > rcond * self.row_values.max()).nonzero().squeeze(1)
        values, columns = large_eigenpairs(self.column_factor, rcond)
        c, n = columns.shape

        def from_eigenbasis(coordinates: Tensor) -> Tensor:
            matrix = coordinates.new_zeros(self.shape)
            matrix[seen] = coordinates @ columns.mT
            return matrix

        return PseudoInverse(
            lambda matrix: matrix[seen] @ columns,
            from_eigenbasis,
            *pseudo_reciprocal(torch.outer(self.row_values[seen], values), 0.0),
            Restriction(
                lambda curvature: curvature.within(seen, columns),
                writing=c * n * (c + n),
                changing=2 * len(seen) * c * n,
                saved=len(seen) * (c * c - n * n),  # unless clients see far fewer tokens
            ),
        )

    def within(self, seen: Tensor, columns: Tensor) -> Self:
        """Gives the operator on coordinates of some rows in another basis of columns.

        Args:
            seen: Indices of the rows, of shape ``(m,)``.
            columns: Orthonormal columns ``V``, of shape ``(columns, n)``.

        Returns:
            The operator on matrices of shape ``(m, n)``.
        """
        return type(self)(self.row_values[seen], change_basis(self.column_factor, columns))

    @override
    def eigenvalues(self) -> Tensor:
        return torch.outer(self.row_values, symmetric_eigenvalues(self.column_factor))

    @override
    def norm(self) -> Tensor:
        return frobenius_norm(self.row_values) * frobenius_norm(self.column_factor)

    @override
    def trace(self) -> Tensor:
        return self.row_values.sum().double() * self.column_factor.trace().double()

    @override
    def average_over_columns(self) -> Self:
        mean = self.column_factor.diagonal().mean()
        return type(self)(self.row_values, mean * torch.eye(self.shape[1]).to(mean))

    @override
    def of_inputs(self) -> Self:
        # The inputs of an embedding are its tokens, one for each row.
        return type(self)(self.row_values, torch.eye(self.shape[1]).to(self.column_factor))


@dataclass(frozen=True, eq=False)
class EmbeddingEigenKronecker(Eigenbased):
    """The operator ``F W = (S * (W V)) V'``: EKFAC of an embedding, without a basis over tokens.

    Attributes:
        column_basis: ``V``, orthogonal, of shape ``(columns, columns)``.
        spectrum: ``S``, the eigenvalues, of shape ``(rows, columns)``: second moments of the
            gradient's entries in that basis.

    Example:
        >>> curvature = EmbeddingEigenKronecker(torch.eye(1), torch.tensor([[0.5], [1.5]]))
        >>> curvature.apply(torch.ones(2, 1))
        tensor([[0.5000],
                [1.5000]])
    """

    column_basis: Tensor
    spectrum: Tensor
    kind: ClassVar[str] = "embedding_ekfac"
    inputs_on: ClassVar[InputSide | None] = "rows"
    tensor_roles: ClassVar[Mapping[str, TensorRole]] = {
        "column_basis": "basis",
        "spectrum": "values",
    }
    factored: ClassVar[type[Factored]] = EmbeddingKronecker

    @override
    def to_eigenbasis(self, matrix: Tensor) -> Tensor:
        return matrix @ self.column_basis

    @override
    def from_eigenbasis(self, coordinates: Tensor) -> Tensor:
        return coordinates @ self.column_basis.mT

    @override
    def diagonal(self) -> Tensor:
        return self.spectrum @ self.column_basis.square().mT

    @classmethod
    @override
    def tensor_shapes(cls, shape: tuple[int, int], kernel: int = 1) -> dict[str, tuple[int, ...]]:
        rows, columns = shape
        return {"column_basis": (columns, columns), "spectrum": (rows, columns)}

    @override
    def kronecker(self) -> EmbeddingKronecker:
        total = self.spectrum.mean().clamp_min(torch.finfo(self.spectrum.dtype).tiny)
        inputs = self.spectrum.mean(0) / total
        return EmbeddingKronecker(
            self.spectrum.mean(1), (self.column_basis * inputs) @ self.column_basis.mT
        )
