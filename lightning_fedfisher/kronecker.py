"""Kinds of curvature with a Kronecker form: K-FAC, EKFAC, and both for embeddings.

An embedding's matrix has a row for each token. Its factor over tokens is diagonal, as one position
looks up one token, and is kept so: a vocabulary squared would fit no file.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.curvature import (
    Curvature,
    Dense,
    Diagonal,
    Identity,
    damp,
    eigen,
    require_positive,
    symmetric_power,
)


class Factored(Curvature):
    """A Kronecker product, by a factor on either side."""

    @abstractmethod
    def eigen(self) -> Eigenbased:
        """The same operator by its eigenbases and spectrum."""

    @abstractmethod
    def _powered(self, exponent: float) -> Self:
        """The product of the factors' powers."""

    @override
    def power(self, exponent: float) -> Self:
        require_positive(exponent)
        return self if exponent == 1 else self._powered(exponent)

    @override
    def inverse(self, damping: float) -> Callable[[Tensor], Tensor]:
        return self.eigen().inverse(damping)


class Eigenbased(Curvature):
    """A spectrum in a Kronecker product of eigenbases.

    Attributes:
        input_basis: orthogonal, ``(in, in)``.
        spectrum: of shape ``(out, in)``.
    """

    input_basis: Tensor
    spectrum: Tensor

    @abstractmethod
    def _scale(self, matrix: Tensor, spectrum: Tensor) -> Tensor:
        """Applies the operator with another spectrum."""

    @abstractmethod
    def kronecker(self) -> Factored:
        """A Kronecker product of the same traces over either side."""

    @property
    @override
    def shape(self) -> tuple[int, int]:
        rows, columns = self.spectrum.shape
        return rows, columns

    @override
    def apply(self, matrix: Tensor) -> Tensor:
        return self._scale(matrix, self.spectrum)

    @override
    def power(self, exponent: float) -> Self:
        require_positive(exponent)
        return self.with_spectrum(self.spectrum.clamp_min(0).pow(exponent))

    @override
    def inverse(self, damping: float) -> Callable[[Tensor], Tensor]:
        inverse = 1 / damp(self.spectrum, damping)
        return lambda matrix: self._scale(matrix, inverse)

    @override
    def trace(self) -> Tensor:
        return self.spectrum.sum()

    @classmethod
    @override
    def mean(cls, curvatures: Sequence[Curvature], shares: Sequence[float]) -> Curvature:
        # Bases cannot be averaged; the closest Kronecker products can.
        parts = [c.kronecker() for c in curvatures if isinstance(c, cls)]
        return type(parts[0]).mean(parts, shares)

    def with_spectrum(self, spectrum: Tensor) -> Self:
        """The operator with another spectrum in the same basis."""
        return self.from_tensors({**self.tensors(), "spectrum": spectrum}, self.shape)


@dataclass(frozen=True, eq=False)
class Kronecker(Factored):
    """``F W = G W A``: K-FAC (Martens & Grosse, 2015).

    Attributes:
        output_factor: ``G``, second moment of the gradients at the outputs, ``(out, out)``.
        input_factor: ``A``, second moment of the inputs, ``(in, in)``.
    """

    output_factor: Tensor
    input_factor: Tensor
    kind: ClassVar[str] = "kronecker"

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.output_factor.shape[0], self.input_factor.shape[0]

    @override
    def apply(self, matrix: Tensor) -> Tensor:
        return self.output_factor @ matrix @ self.input_factor

    @override
    def _powered(self, exponent: float) -> Self:
        return type(self)(
            symmetric_power(self.output_factor, exponent),
            symmetric_power(self.input_factor, exponent),
        )

    @override
    def eigen(self) -> EigenKronecker:
        output_values, output_basis = eigen(self.output_factor)
        input_values, input_basis = eigen(self.input_factor)
        return EigenKronecker(output_basis, input_basis, torch.outer(output_values, input_values))

    @override
    def diagonal(self) -> Tensor:
        return torch.outer(self.output_factor.diagonal(), self.input_factor.diagonal())

    @classmethod
    @override
    def tensor_shapes(cls, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        rows, columns = shape
        return {"output_factor": (rows, rows), "input_factor": (columns, columns)}


@dataclass(frozen=True, eq=False)
class LookupKronecker(Factored):
    """``F W = diag(t) W A``: K-FAC of an embedding, whose factor over tokens is diagonal.

    Attributes:
        output_values: ``t``, how often each token is looked up at a position, ``(out,)``.
        input_factor: ``A``, second moment of the gradients at the embedding's output, ``(in, in)``.
    """

    output_values: Tensor
    input_factor: Tensor
    kind: ClassVar[str] = "lookup_kronecker"

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.output_values.shape[0], self.input_factor.shape[0]

    @override
    def apply(self, matrix: Tensor) -> Tensor:
        return self.output_values.unsqueeze(1) * (matrix @ self.input_factor)

    @override
    def _powered(self, exponent: float) -> Self:
        return type(self)(
            self.output_values.clamp_min(0).pow(exponent),
            symmetric_power(self.input_factor, exponent),
        )

    @override
    def diagonal(self) -> Tensor:
        return torch.outer(self.output_values, self.input_factor.diagonal())

    @classmethod
    @override
    def tensor_shapes(cls, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        rows, columns = shape
        return {"output_values": (rows,), "input_factor": (columns, columns)}

    @override
    def eigen(self) -> LookupEigenKronecker:
        values, basis = eigen(self.input_factor)
        return LookupEigenKronecker(basis, torch.outer(self.output_values, values))


@dataclass(frozen=True, eq=False)
class EigenKronecker(Eigenbased):
    """``F W = U (S * (U' W V)) V'``: EKFAC, K-FAC's eigenbases with a spectrum of its own.

    (George et al., 2018.)

    Attributes:
        output_basis: ``U``, orthogonal, ``(out, out)``.
        input_basis: ``V``, orthogonal, ``(in, in)``.
        spectrum: ``S``, second moment of the gradient's entries in that basis, ``(out, in)``.
    """

    output_basis: Tensor
    input_basis: Tensor
    spectrum: Tensor
    kind: ClassVar[str] = "ekfac"

    @override
    def _scale(self, matrix: Tensor, spectrum: Tensor) -> Tensor:
        turned = self.output_basis.mT @ matrix @ self.input_basis
        return self.output_basis @ (spectrum * turned) @ self.input_basis.mT

    @override
    def diagonal(self) -> Tensor:
        return self.output_basis.square() @ self.spectrum @ self.input_basis.square().mT

    @classmethod
    @override
    def tensor_shapes(cls, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        rows, columns = shape
        return {
            "output_basis": (rows, rows),
            "input_basis": (columns, columns),
            "spectrum": (rows, columns),
        }

    @override
    def kronecker(self) -> Kronecker:
        outputs, inputs = self.spectrum.sum(1), self.spectrum.mean(0)
        total = self.spectrum.mean().clamp_min(torch.finfo(self.spectrum.dtype).tiny)
        return Kronecker(
            (self.output_basis * outputs / self.shape[1]) @ self.output_basis.mT,
            (self.input_basis * (inputs / total)) @ self.input_basis.mT,
        )


@dataclass(frozen=True, eq=False)
class LookupEigenKronecker(Eigenbased):
    """``F W = (S * (W V)) V'``: EKFAC of an embedding, whose basis over tokens is the identity.

    Attributes:
        input_basis: ``V``, orthogonal, ``(in, in)``.
        spectrum: ``S``, second moment of the gradient's entries in that basis, ``(out, in)``.
    """

    input_basis: Tensor
    spectrum: Tensor
    kind: ClassVar[str] = "lookup_ekfac"

    @override
    def _scale(self, matrix: Tensor, spectrum: Tensor) -> Tensor:
        return (spectrum * (matrix @ self.input_basis)) @ self.input_basis.mT

    @override
    def diagonal(self) -> Tensor:
        return self.spectrum @ self.input_basis.square().mT

    @classmethod
    @override
    def tensor_shapes(cls, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        rows, columns = shape
        return {"input_basis": (columns, columns), "spectrum": (rows, columns)}

    @override
    def kronecker(self) -> LookupKronecker:
        total = self.spectrum.mean().clamp_min(torch.finfo(self.spectrum.dtype).tiny)
        inputs = self.spectrum.mean(0) / total
        return LookupKronecker(
            self.spectrum.mean(1), (self.input_basis * inputs) @ self.input_basis.mT
        )


KINDS: dict[str, type[Curvature]] = {
    cls.kind: cls
    for cls in (
        Identity,
        Diagonal,
        Kronecker,
        LookupKronecker,
        EigenKronecker,
        LookupEigenKronecker,
        Dense,
    )
}
"""Every kind by the name under which an update file records it."""
