"""K-FAC of a convolution with many inputs: its patches' factor is channels times kernel.

The second moment of unfolded patches has as many rows as a filter has weights, 4608 for the usual
512 channels and nine kernel elements: 85 MB, and a minute to decompose. As a product of a factor
over channels and one over kernel elements it takes an eightieth of that.
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
from lightning_fedfisher.curvature.kronecker import Kronecker
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
class ConvolutionKronecker(Curvature):
    """The operator ``F W = G W (C x K)``: K-FAC with patches that are channels times kernel.

    A bias column, where there is one, is apart: ``F`` is ``G`` on it, as if patches had mean zero.

    Attributes:
        row_factor: ``G``, the second moment of the gradients at the outputs, of shape
            ``(rows, rows)``.
        channel_factor: ``C``, the second moment of the input channels, averaged over kernel
            elements, of shape ``(channels, channels)``.
        kernel_factor: ``K``, the second moment of the kernel elements, averaged over channels and
            scaled to a mean of one on its diagonal, of shape ``(elements, elements)``.
        has_bias: Whether the last column of the matrix is a bias.

    Example:
        >>> kernel = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
        >>> curvature = ConvolutionKronecker(torch.tensor([[2.0]]), torch.tensor([[3.0]]), kernel)
        >>> curvature.apply(torch.tensor([[1.0, 0.0]]))
        tensor([[6., 3.]])
    """

    row_factor: Tensor
    channel_factor: Tensor
    kernel_factor: Tensor
    has_bias: bool = False
    kind: ClassVar[str] = "convolution_kronecker"
    tensor_roles: ClassVar[Mapping[str, TensorRole]] = {
        "row_factor": "factor",
        "channel_factor": "factor",
        "kernel_factor": "factor",
    }
    restricts: ClassVar[bool] = True
    outputs_factor: ClassVar[str] = "row_factor"
    inputs_on: ClassVar[InputSide | None] = "columns"

    @property
    @override
    def shape(self) -> tuple[int, int]:
        inputs = len(self.channel_factor) * len(self.kernel_factor)
        return len(self.row_factor), inputs + self.has_bias

    @property
    @override
    def kernel(self) -> int:
        return len(self.kernel_factor)

    @override
    def apply(self, matrix: Tensor) -> Tensor:
        return self.row_factor @ self._on_columns(matrix, self.channel_factor, self.kernel_factor)

    @override
    def pseudo_inverse(self, rcond: float) -> PseudoInverse:
        # Each factor by itself, as for every Kronecker product, and what counts alone.
        (rows, u), (channels, v), (kernel, w) = (large_eigenpairs(f, rcond) for f in self._factors)
        spectrum = torch.outer(rows, self._columns(torch.outer(channels, kernel)))
        whole, some = zip(*(basis.shape for basis in (u, v, w)), strict=True)
        return PseudoInverse(
            lambda matrix: u.mT @ self._on_columns(matrix, v, w),
            lambda coordinates: u @ self._on_columns(coordinates, v.mT, w.mT),
            *pseudo_reciprocal(spectrum, 0.0),
            Restriction(
                lambda curvature: curvature.within(u, v, w),
                writing=sum(k * n * (k + n) for k, n in zip(whole, some, strict=True)),
                changing=math.prod(whole) * sum(some) + math.prod(some) * sum(whole),
                saved=math.prod(whole) * sum(whole) - math.prod(some) * sum(some),
            ),
        )

    def within(self, rows: Tensor, channels: Tensor, kernel: Tensor) -> Self:
        """Gives the operator on coordinates in other bases of rows, channels and kernel elements.

        Args:
            rows: Orthonormal columns, of shape ``(rows, l)``.
            channels: Orthonormal columns, of shape ``(channels, m)``.
            kernel: Orthonormal columns, of shape ``(elements, n)``.

        Returns:
            The operator on matrices of shape ``(l, m * n)``, or with one column more for a bias.
        """
        return type(self)(
            change_basis(self.row_factor, rows),
            change_basis(self.channel_factor, channels),
            change_basis(self.kernel_factor, kernel),
            self.has_bias,
        )

    @override
    def average_over_columns(self) -> Self:
        mean = self.trace().to(self.row_factor) / (self.shape[1] * self.row_factor.trace())
        # The bias column has no scale of its own, so the rows take it.
        return type(self)(
            self.row_factor * mean.nan_to_num(),
            torch.eye(len(self.channel_factor)).to(mean),
            torch.eye(self.kernel).to(mean),
            self.has_bias,
        )

    @override
    def of_inputs(self) -> Self:
        rows = torch.eye(len(self.row_factor)).to(self.row_factor)
        return type(self)(rows, self.channel_factor, self.kernel_factor, self.has_bias)

    @override
    def with_inputs(self, change: InputMap) -> Curvature:
        if len(change.units) != len(self.channel_factor):
            return self.to_kronecker().with_inputs(change)
        transposed = InputMap(change.units.mT, len(self.channel_factor))
        half = transposed.on_columns(self.channel_factor)
        channels = transposed.on_columns(half.mT)
        return type(self)(self.row_factor, channels, self.kernel_factor, self.has_bias)

    def to_kronecker(self) -> Kronecker:
        """Writes the product of channels and kernel out as one factor, exactly."""
        inputs = torch.kron(self.channel_factor, self.kernel_factor)
        columns = torch.eye(self.shape[1]).to(inputs)
        columns[: len(inputs), : len(inputs)] = inputs
        return Kronecker(self.row_factor, columns)

    @override
    def diagonal(self) -> Tensor:
        rows, channels, kernel = (factor.diagonal() for factor in self._factors)
        return torch.outer(rows, self._columns(torch.outer(channels, kernel)))

    @override
    def trace(self) -> Tensor:
        rows, channels, kernel = (factor.trace().double() for factor in self._factors)
        return rows * (channels * kernel + self.has_bias)

    @override
    def eigenvalues(self) -> Tensor:
        rows, channels, kernel = map(symmetric_eigenvalues, self._factors)
        return torch.outer(rows, self._columns(torch.outer(channels, kernel)))

    @override
    def norm(self) -> Tensor:
        rows, channels, kernel = map(frobenius_norm, self._factors)
        return rows * torch.hypot(channels * kernel, rows.new_tensor(float(self.has_bias)))

    @override
    def sensitivities(self) -> dict[str, float]:
        # As of every Kronecker product: the traces of the other factors.
        rows, channels, kernel = (float(factor.trace()) for factor in self._factors)
        return {
            "row_factor": channels * kernel + self.has_bias,
            "channel_factor": rows * kernel,
            "kernel_factor": rows * channels,
        }

    @classmethod
    @override
    def tensor_shapes(cls, shape: tuple[int, int], kernel: int = 1) -> dict[str, tuple[int, ...]]:
        rows, columns = shape
        channels = columns // kernel
        if columns - channels * kernel > 1:
            raise ValueError(f"{columns} columns are no channels of {kernel} elements and a bias")
        return {
            "row_factor": (rows, rows),
            "channel_factor": (channels, channels),
            "kernel_factor": (kernel, kernel),
        }

    @classmethod
    @override
    def _build(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Self:
        inputs = math.prod(len(tensors[name]) for name in ("channel_factor", "kernel_factor"))
        return cls(**tensors, has_bias=shape[1] > inputs)

    @property
    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.row_factor, self.channel_factor, self.kernel_factor

    def _columns(self, inputs: Tensor) -> Tensor:
        """Numbers for each column, from those of shape ``(channels, elements)``; 1 for a bias."""
        flat = inputs.flatten()
        return torch.cat([flat, flat.new_ones(1)]) if self.has_bias else flat

    def _on_columns(self, matrix: Tensor, channels: Tensor, kernel: Tensor) -> Tensor:
        """Multiplies a matrix from the right by ``kron(channels, kernel)``; leaves a bias alone."""
        inputs = len(channels) * len(kernel)
        apart = matrix[:, :inputs].reshape(len(matrix), len(channels), len(kernel))
        mapped = ((apart @ kernel).mT @ channels).mT.flatten(1)
        return torch.cat([mapped, matrix[:, inputs:]], dim=1) if self.has_bias else mapped
