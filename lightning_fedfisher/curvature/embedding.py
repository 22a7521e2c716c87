"""Kinds of curvature of embeddings: K-FAC and EKFAC whose factor over tokens is diagonal.

An embedding's matrix has a row for each token. As one position looks up one token, its factor over
tokens is diagonal, and is kept so: a vocabulary squared would fit no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.curvature.base import Form
from lightning_fedfisher.curvature.kronecker import Eigenbased, Factored, without_small
from lightning_fedfisher.curvature.linalg import eigen, eigenvalues, frobenius, symmetric_power


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
    forms: ClassVar[Mapping[str, Form]] = {"output_values": "values", "input_factor": "factor"}

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

    @override
    def sensitivities(self) -> dict[str, float]:
        outputs, inputs = self.output_values.sum(), self.input_factor.trace()
        return {"output_values": float(inputs), "input_factor": float(outputs)}

    @classmethod
    @override
    def tensor_shapes(cls, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        rows, columns = shape
        return {"output_values": (rows,), "input_factor": (columns, columns)}

    @override
    def eigen(self, cut: float = 0.0) -> LookupEigenKronecker:
        values, basis = eigen(self.input_factor)
        spectrum = torch.outer(without_small(self.output_values, cut), without_small(values, cut))
        return LookupEigenKronecker(basis, spectrum)

    @override
    def eigenvalues(self) -> Tensor:
        return torch.outer(self.output_values, eigenvalues(self.input_factor))

    @override
    def norm(self) -> Tensor:
        return frobenius(self.output_values) * frobenius(self.input_factor)

    @override
    def trace(self) -> Tensor:
        return self.output_values.sum().double() * self.input_factor.trace().double()

    @override
    def over_outputs(self) -> Self:
        mean = self.input_factor.diagonal().mean()
        return type(self)(self.output_values, mean * torch.eye(self.shape[1]).to(mean))

    @override
    def of_inputs(self) -> Self:
        # The inputs of an embedding are its tokens, one for each row.
        return type(self)(self.output_values, torch.eye(self.shape[1]).to(self.input_factor))


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
    forms: ClassVar[Mapping[str, Form]] = {"input_basis": "basis", "spectrum": "values"}
    factored: ClassVar[type[Factored]] = LookupKronecker

    @override
    def _turn(self, matrix: Tensor) -> Tensor:
        return matrix @ self.input_basis

    @override
    def _back(self, turned: Tensor) -> Tensor:
        return turned @ self.input_basis.mT

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
