"""Curvature as a Kronecker product of two factors, K-FAC, and with other eigenvalues, EKFAC."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.curvature.base import Curvature, InputSide
from lightning_fedfisher.curvature.input_gram import InputGram
from lightning_fedfisher.curvature.input_map import InputMap
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


class Factored(Curvature):
    """A Kronecker product, stored as one factor on either side of the weight matrix."""

    @abstractmethod
    def eigendecompose(self, rcond: float = 0.0) -> Eigenbased:
        """Writes the operator by its eigenvectors and eigenvalues.

        Args:
            rcond: Eigenvalues of a factor up to this fraction of its largest one become zero.

        Returns:
            The same operator as the corresponding kind with an eigenbasis.
        """

    @override
    def pseudo_inverse(self, rcond: float) -> PseudoInverse:
        # Each factor by itself: a direction that is small on both sides does not count as zero.
        return self.eigendecompose(rcond).pseudo_inverse(0.0)


class Eigenbased(Curvature):
    """Eigenvalues in a Kronecker product of eigenbases.

    Attributes:
        column_basis: Eigenvectors of the column factor, of shape ``(columns, columns)``.
        spectrum: The eigenvalues, of shape ``(rows, columns)``.
        factored: The kind with the factors that the eigenbases are of.
    """

    column_basis: Tensor
    spectrum: Tensor
    factored: ClassVar[type[Factored]]

    @abstractmethod
    def to_eigenbasis(self, matrix: Tensor) -> Tensor:
        """Maps a weight matrix to its coordinates in the eigenbases."""

    @abstractmethod
    def from_eigenbasis(self, coordinates: Tensor) -> Tensor:
        """Maps coordinates in the eigenbases to the weight matrix."""

    @abstractmethod
    def kronecker(self) -> Factored:
        """Approximates the operator by a Kronecker product with the same partial traces."""

    @property
    @override
    def shape(self) -> tuple[int, int]:
        rows, columns = self.spectrum.shape
        return rows, columns

    @override
    def apply(self, matrix: Tensor) -> Tensor:
        return self.from_eigenbasis(self.spectrum * self.to_eigenbasis(matrix))

    @override
    def pseudo_inverse(self, rcond: float) -> PseudoInverse:
        return PseudoInverse(
            self.to_eigenbasis, self.from_eigenbasis, *pseudo_reciprocal(self.spectrum, rcond)
        )

    @override
    def average_over_columns(self) -> Self:
        rows = self.spectrum.mean(1, keepdim=True)
        return self.with_spectrum(rows.expand_as(self.spectrum).contiguous())

    @override
    def sensitivities(self) -> dict[str, float]:
        # In U S^(1/2) U' an error of the basis U occurs on both sides: two terms, and a third where
        # the two errors share an index.
        trace = float(self.spectrum.sum())
        sizes = {
            name: len(self.tensors()[name]) for name in self.tensor_roles if name != "spectrum"
        }
        bases = {name: 2 * (size + 1) * trace / size**2 for name, size in sizes.items()}
        return bases | {"spectrum": 1.0}

    @override
    def eigenvalues(self) -> Tensor:
        return self.spectrum

    @classmethod
    @override
    def mean(cls, curvatures: Iterable[Curvature], client_weights: Sequence[float]) -> Curvature:
        # Bases cannot be averaged, but Kronecker products with the same partial traces can.
        return cls.factored.mean(
            (c.kronecker() for c in curvatures if isinstance(c, cls)), client_weights
        )

    def with_spectrum(self, spectrum: Tensor) -> Self:
        """Gives the operator with other eigenvalues in the same basis.

        Args:
            spectrum: The eigenvalues, of shape ``(rows, columns)``.

        Returns:
            A curvature of the same kind.
        """
        return self.from_tensors({**self.tensors(), "spectrum": spectrum}, self.shape, self.kernel)


@dataclass(frozen=True, eq=False)
class Kronecker(Factored):
    """The operator ``F W = G W A``: K-FAC of a layer ``y = W x`` (Martens & Grosse, 2015).

    Attributes:
        row_factor: ``G``, the second moment of the gradients at the outputs, of shape
            ``(rows, rows)``.
        column_factor: ``A``, the second moment of the inputs, of shape ``(columns, columns)``.

    Example:
        >>> curvature = Kronecker(torch.tensor([[2.0]]), torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
        >>> curvature.apply(torch.tensor([[1.0, 0.0]]))
        tensor([[2., 1.]])
    """

    row_factor: Tensor
    column_factor: Tensor
    kind: ClassVar[str] = "kronecker"
    tensor_roles: ClassVar[Mapping[str, TensorRole]] = {
        "row_factor": "factor",
        "column_factor": "factor",
    }
    restricts: ClassVar[bool] = True
    outputs_factor: ClassVar[str] = "row_factor"
    inputs_factor: ClassVar[str] = "column_factor"
    inputs_on: ClassVar[InputSide | None] = "columns"
    exact_inputs: ClassVar[bool] = True

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.row_factor.shape[0], self.column_factor.shape[0]

    @override
    def apply(self, matrix: Tensor) -> Tensor:
        return self.row_factor @ matrix @ self.column_factor

    @override
    def eigendecompose(self, rcond: float = 0.0) -> EigenKronecker:
        return EigenKronecker(*self._bases_and_spectrum(rcond))

    def _bases_and_spectrum(self, rcond: float) -> tuple[Tensor, Tensor, Tensor]:
        """Computes the row basis, the column basis and the eigenvalues."""
        row_values, row_basis = symmetric_eigendecomposition(self.row_factor)
        values, column_basis = symmetric_eigendecomposition(self.column_factor)
        spectrum = torch.outer(
            zero_small_values(row_values, rcond), zero_small_values(values, rcond)
        )
        return row_basis, column_basis, spectrum

    @override
    def pseudo_inverse(self, rcond: float) -> PseudoInverse:
        # Coordinates are those of eigenvectors that count alone: often a few.
        row_values, rows = large_eigenpairs(self.row_factor, rcond)
        values, columns = large_eigenpairs(self.column_factor, rcond)
        spectrum = torch.outer(row_values, values)
        (r, m), (c, n) = rows.shape, columns.shape
        return PseudoInverse(
            lambda matrix: rows.mT @ matrix @ columns,
            lambda coordinates: rows @ coordinates @ columns.mT,
            *pseudo_reciprocal(spectrum, 0.0),
            Restriction(
                lambda curvature: curvature.within(rows, columns),
                writing=r * m * (r + m) + c * n * (c + n),
                changing=2 * m * c * (r + n),
                saved=r * c * (r + c) - m * n * (m + n),
            ),
        )

    def within(self, rows: Tensor, columns: Tensor) -> Self:
        """Gives the operator on coordinates in other bases of rows and columns.

        Args:
            rows: Orthonormal columns ``U``, of shape ``(rows, m)``.
            columns: Orthonormal columns ``V``, of shape ``(columns, n)``.

        Returns:
            The operator ``X -> U' F(U X V') V`` on matrices of shape ``(m, n)``.
        """
        return type(self)(
            change_basis(self.row_factor, rows), change_basis(self.column_factor, columns)
        )

    @override
    def eigenvalues(self) -> Tensor:
        return torch.outer(
            symmetric_eigenvalues(self.row_factor), symmetric_eigenvalues(self.column_factor)
        )

    @override
    def norm(self) -> Tensor:
        return frobenius_norm(self.row_factor) * frobenius_norm(self.column_factor)

    @override
    def trace(self) -> Tensor:
        # In float64, where the product neither overflows nor vanishes.
        return self.row_factor.trace().double() * self.column_factor.trace().double()

    @override
    def average_over_columns(self) -> Self:
        mean = self.column_factor.diagonal().mean()
        return type(self)(self.row_factor, mean * torch.eye(self.shape[1]).to(mean))

    @override
    def of_inputs(self) -> Curvature:
        return InputGram(self.column_factor, rows=self.shape[0])

    @override
    def with_inputs(self, change: InputMap) -> Self:
        transposed = change.transposed
        half = transposed.on_columns(self.column_factor)
        return type(self)(self.row_factor, transposed.on_columns(half.mT))

    @override
    def diagonal(self) -> Tensor:
        return torch.outer(self.row_factor.diagonal(), self.column_factor.diagonal())

    @override
    def sensitivities(self) -> dict[str, float]:
        # The squared norm of a product of roots is the product of theirs, which are traces.
        outputs, inputs = self.row_factor.trace(), self.column_factor.trace()
        return {"row_factor": float(inputs), "column_factor": float(outputs)}

    @classmethod
    @override
    def tensor_shapes(cls, shape: tuple[int, int], kernel: int = 1) -> dict[str, tuple[int, ...]]:
        rows, columns = shape
        return {"row_factor": (rows, rows), "column_factor": (columns, columns)}


@dataclass(frozen=True, eq=False)
class EigenKronecker(Eigenbased):
    """The operator ``F W = U (S * (U' W V)) V'``: EKFAC, K-FAC with corrected eigenvalues.

    (George et al., 2018, "Fast Approximate Natural Gradient Descent in a Kronecker-factored
    Eigenbasis".)

    Attributes:
        row_basis: ``U``, orthogonal, of shape ``(rows, rows)``.
        column_basis: ``V``, orthogonal, of shape ``(columns, columns)``.
        spectrum: ``S``, the eigenvalues, of shape ``(rows, columns)``: second moments of the
            gradient's entries in that basis.

    Example:
        >>> curvature = EigenKronecker(torch.eye(1), torch.eye(2), torch.tensor([[2.0, 3.0]]))
        >>> curvature.apply(torch.tensor([[1.0, 1.0]]))
        tensor([[2., 3.]])
    """

    row_basis: Tensor
    column_basis: Tensor
    spectrum: Tensor
    kind: ClassVar[str] = "ekfac"
    tensor_roles: ClassVar[Mapping[str, TensorRole]] = {
        "row_basis": "basis",
        "column_basis": "basis",
        "spectrum": "values",
    }
    inputs_on: ClassVar[InputSide | None] = "columns"
    factored: ClassVar[type[Kronecker]] = Kronecker

    @override
    def to_eigenbasis(self, matrix: Tensor) -> Tensor:
        return self.row_basis.mT @ matrix @ self.column_basis

    @override
    def from_eigenbasis(self, coordinates: Tensor) -> Tensor:
        return self.row_basis @ coordinates @ self.column_basis.mT

    @override
    def of_inputs(self) -> Curvature:
        return self.kronecker().of_inputs()

    @override
    def with_inputs(self, change: InputMap) -> Self:
        # The basis is not orthogonal any more, so powers must be taken before.
        basis = change.transposed.on_columns(self.column_basis.mT).mT
        # In the memory layout that it would have if read from disk, so that rounding is the same.
        return type(self)(self.row_basis, basis.contiguous(), self.spectrum)

    @override
    def diagonal(self) -> Tensor:
        return self.row_basis.square() @ self.spectrum @ self.column_basis.square().mT

    @classmethod
    @override
    def tensor_shapes(cls, shape: tuple[int, int], kernel: int = 1) -> dict[str, tuple[int, ...]]:
        rows, columns = shape
        return {
            "row_basis": (rows, rows),
            "column_basis": (columns, columns),
            "spectrum": (rows, columns),
        }

    @override
    def kronecker(self) -> Kronecker:
        rows, columns = self.spectrum.sum(1), self.spectrum.mean(0)
        total = self.spectrum.mean().clamp_min(torch.finfo(self.spectrum.dtype).tiny)
        return self.factored(
            (self.row_basis * rows / self.shape[1]) @ self.row_basis.mT,
            (self.column_basis * (columns / total)) @ self.column_basis.mT,
        )


@dataclass(frozen=True, eq=False)
class TransposedKronecker(Kronecker):
    """The operator ``F W = A W G``: K-FAC of a layer ``y = W' x``, as of a transposed convolution.

    Attributes:
        row_factor: ``A``, the second moment of the inputs, of shape ``(rows, rows)``.
        column_factor: ``G``, the second moment of the gradients at the outputs, of shape
            ``(columns, columns)``.

    Example:
        >>> inputs = torch.tensor([[3.0]])
        >>> TransposedKronecker(inputs, torch.eye(2)).of_inputs().apply(torch.ones(1, 2))
        tensor([[3., 3.]])
    """

    kind: ClassVar[str] = "transposed_kronecker"
    outputs_factor: ClassVar[str] = "column_factor"
    inputs_factor: ClassVar[str] = "row_factor"
    inputs_on: ClassVar[InputSide | None] = "rows"

    @override
    def eigendecompose(self, rcond: float = 0.0) -> TransposedEigenKronecker:
        return TransposedEigenKronecker(*self._bases_and_spectrum(rcond))

    @override
    def of_inputs(self) -> Curvature:
        return type(self)(self.row_factor, torch.eye(self.shape[1]).to(self.column_factor))

    @override
    def with_inputs(self, change: InputMap) -> Self:
        return self._refuse_inputs()


@dataclass(frozen=True, eq=False)
class TransposedEigenKronecker(EigenKronecker):
    """EKFAC of a layer ``y = W' x``, whose inputs belong to the rows of its matrix.

    Example:
        >>> TransposedEigenKronecker(torch.eye(1), torch.eye(1), torch.ones(1, 1)).inputs_on
        'rows'
    """

    kind: ClassVar[str] = "transposed_ekfac"
    inputs_on: ClassVar[InputSide | None] = "rows"
    factored: ClassVar[type[Kronecker]] = TransposedKronecker

    @override
    def with_inputs(self, change: InputMap) -> Self:
        return self._refuse_inputs()
