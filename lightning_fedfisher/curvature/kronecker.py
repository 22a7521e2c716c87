"""Kinds of curvature with a Kronecker form: K-FAC and EKFAC."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.curvature.base import Curvature, Form
from lightning_fedfisher.curvature.input_map import InputMap
from lightning_fedfisher.curvature.linalg import (
    PseudoInverse,
    eigen,
    eigenvalues,
    frobenius,
    reciprocal,
    require_positive,
    symmetric_power,
)


class Factored(Curvature):
    """A Kronecker product, by a factor on either side."""

    @abstractmethod
    def eigen(self, cut: float = 0.0) -> Eigenbased:
        """The same operator by its eigenbases and spectrum.

        Args:
            cut: a factor's eigenvalues up to this share of its largest become zero.

        Returns:
            The operator.
        """

    @abstractmethod
    def _powered(self, exponent: float) -> Self:
        """The product of the factors' powers."""

    @override
    def power(self, exponent: float) -> Self:
        require_positive(exponent)
        return self if exponent == 1 else self._powered(exponent)

    @override
    def pseudo_inverse(self, cut: float) -> PseudoInverse:
        # Either factor is cut by itself: what both sides see little of is still seen.
        return self.eigen(cut).pseudo_inverse(0.0)


class Eigenbased(Curvature):
    """A spectrum in a Kronecker product of eigenbases.

    Attributes:
        input_basis: orthogonal, ``(in, in)``.
        spectrum: of shape ``(out, in)``.
    """

    input_basis: Tensor
    spectrum: Tensor
    factored: ClassVar[type[Factored]]

    @abstractmethod
    def _turn(self, matrix: Tensor) -> Tensor:
        """From a weight matrix to its coordinates in the bases."""

    @abstractmethod
    def _back(self, turned: Tensor) -> Tensor:
        """From coordinates to the weight matrix."""

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
        return self._back(self.spectrum * self._turn(matrix))

    @override
    def power(self, exponent: float) -> Self:
        require_positive(exponent)
        return self.with_spectrum(self.spectrum.clamp_min(0).pow(exponent))

    @override
    def pseudo_inverse(self, cut: float) -> PseudoInverse:
        return PseudoInverse(self._turn, self._back, *reciprocal(self.spectrum, cut))

    @override
    def over_outputs(self) -> Self:
        rows = self.spectrum.mean(1, keepdim=True)
        return self.with_spectrum(rows.expand_as(self.spectrum).contiguous())

    @override
    def sensitivities(self) -> dict[str, float]:
        # A basis U meets the root on both sides: twice, and once more where they meet each other.
        trace = float(self.spectrum.sum())
        sizes = {name: len(self.tensors()[name]) for name in self.forms if name != "spectrum"}
        bases = {name: 2 * (size + 1) * trace / size**2 for name, size in sizes.items()}
        return bases | {"spectrum": 1.0}

    @override
    def eigenvalues(self) -> Tensor:
        return self.spectrum

    @classmethod
    @override
    def mean(cls, curvatures: Iterable[Curvature], shares: Sequence[float]) -> Curvature:
        # Bases cannot be averaged; the closest Kronecker products can.
        return cls.factored.mean((c.kronecker() for c in curvatures if isinstance(c, cls)), shares)

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
    forms: ClassVar[Mapping[str, Form]] = {"output_factor": "factor", "input_factor": "factor"}
    holds_inputs: ClassVar[bool] = True

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
    def eigen(self, cut: float = 0.0) -> EigenKronecker:
        output_values, output_basis = eigen(self.output_factor)
        input_values, input_basis = eigen(self.input_factor)
        spectrum = torch.outer(without_small(output_values, cut), without_small(input_values, cut))
        return EigenKronecker(output_basis, input_basis, spectrum)

    @override
    def eigenvalues(self) -> Tensor:
        return torch.outer(eigenvalues(self.output_factor), eigenvalues(self.input_factor))

    @override
    def norm(self) -> Tensor:
        return frobenius(self.output_factor) * frobenius(self.input_factor)

    @override
    def trace(self) -> Tensor:
        # In float64, where the product neither overflows nor vanishes.
        return self.output_factor.trace().double() * self.input_factor.trace().double()

    @override
    def over_outputs(self) -> Self:
        mean = self.input_factor.diagonal().mean()
        return type(self)(self.output_factor, mean * torch.eye(self.shape[1]).to(mean))

    @override
    def of_inputs(self) -> Self:
        return type(self)(torch.eye(self.shape[0]).to(self.output_factor), self.input_factor)

    @override
    def with_inputs(self, change: InputMap) -> Self:
        back = change.transposed
        half = back.on_columns(self.input_factor)
        return type(self)(self.output_factor, back.on_columns(half.mT))

    @override
    def diagonal(self) -> Tensor:
        return torch.outer(self.output_factor.diagonal(), self.input_factor.diagonal())

    @override
    def sensitivities(self) -> dict[str, float]:
        # The norm of a product is that of its factors, and a root's squared is a trace.
        outputs, inputs = self.output_factor.trace(), self.input_factor.trace()
        return {"output_factor": float(inputs), "input_factor": float(outputs)}

    @classmethod
    @override
    def tensor_shapes(cls, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        rows, columns = shape
        return {"output_factor": (rows, rows), "input_factor": (columns, columns)}


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
    forms: ClassVar[Mapping[str, Form]] = {
        "output_basis": "basis",
        "input_basis": "basis",
        "spectrum": "values",
    }
    holds_inputs: ClassVar[bool] = True
    factored: ClassVar[type[Factored]] = Kronecker

    @override
    def _turn(self, matrix: Tensor) -> Tensor:
        return self.output_basis.mT @ matrix @ self.input_basis

    @override
    def _back(self, turned: Tensor) -> Tensor:
        return self.output_basis @ turned @ self.input_basis.mT

    @override
    def of_inputs(self) -> Kronecker:
        return self.kronecker().of_inputs()

    @override
    def with_inputs(self, change: InputMap) -> Self:
        # The basis is orthogonal no more: powers come before.
        basis = change.transposed.on_columns(self.input_basis.mT).mT
        # In the order in which it would come back from disk, lest rounding differ.
        return type(self)(self.output_basis, basis.contiguous(), self.spectrum)

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


def without_small(values: Tensor, cut: float) -> Tensor:
    """Eigenvalues of which the small ones are zero.

    Args:
        values: not negative, of shape ``(n,)``.
        cut: share of the largest up to which they are small.

    Returns:
        Of the same shape.
    """
    return torch.where(values > cut * values.max(), values, 0.0)
