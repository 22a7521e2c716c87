"""Transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from lightning_fedfisher.extraction.layer_types.base import (
    FunctionCall,
    KroneckerLayer,
    LayerType,
    flatten_positions,
)
from lightning_fedfisher.extraction.layer_types.conv_geometry import ConvGeometry
from lightning_fedfisher.extraction.layer_types.scale_shift import lone_bias


@dataclass(frozen=True)
class TransposedConvolution(KroneckerLayer):
    """A transposed convolution without groups.

    Its matrix has shape ``(input channels, output channels * kernel elements)``: inputs are on the
    rows, and patches of the gradient on the columns.

    Attributes:
        geometry: Kernel size, stride, padding and dilation of the convolution that it transposes,
            which slides over the output.
        positions: Spatial size of the input.

    Example:
        >>> import torch
        >>> geometry = ConvGeometry.from_arguments(kernel=[2], stride=1, padding=0, dilation=1)
        >>> layer = TransposedConvolution(geometry, positions=(2,))
        >>> inputs = torch.tensor([[[1.0, 10.0]]])
        >>> gradients = torch.tensor([[[[1.0, 2.0, 3.0]]]])
        >>> layer.per_sample_gradients(inputs, gradients, samples=1)
        tensor([[[21., 32.]]])
    """

    geometry: ConvGeometry
    positions: tuple[int, ...]
    kind: ClassVar[str] = "transposed_kronecker"
    title: ClassVar[str] = "a transposed convolution, with its inputs on the rows,"
    inputs_are_rows: ClassVar[bool] = True

    @override
    def unfold_inputs(self, inputs: Tensor, samples: int) -> Tensor:
        return flatten_positions(inputs, samples)

    @override
    def unfold_gradient(self, gradient: Tensor, samples: int) -> Tensor:
        # Only as much of the output as the kernel reaches from some position of the input: output
        # padding may add more at the far end, or padding cut some of it off there.
        reached = [
            (n - 1) * s + d * (k - 1) + 1 - before
            for n, s, d, k, (before, _) in zip(
                self.positions,
                self.geometry.stride,
                self.geometry.dilation,
                self.geometry.kernel,
                self.geometry.padding,
                strict=True,
            )
        ]
        # functional.pad takes the last dimension first.
        sides = [
            side
            for size, now in reversed(list(zip(reached, gradient.shape[2:], strict=True)))
            for side in (0, size - now)
        ]
        before_only = tuple((before, 0) for before, _ in self.geometry.padding)
        patches = replace(self.geometry, padding=before_only).unfold(
            functional.pad(gradient, sides)
        )
        return patches.reshape(len(patches), samples, -1).transpose(0, 1)

    @override
    def peak_numel(self, inputs: Tensor, gradients: Tensor) -> int:
        return gradients.numel() * self.geometry.overlap


def read_transposed_convolution(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> FunctionCall | None:
    """Reads the arguments of `torch.nn.functional.conv_transpose1d`, ``2d`` and ``3d``.

    Returns:
        The call, or None if its input has no batch dimension.
    """
    if inputs.ndim != weight.ndim:
        return None
    geometry = ConvGeometry.from_arguments(weight.shape[2:], stride, padding, dilation)
    positions = tuple(inputs.shape[2:])

    def weight_type(has_bias: bool) -> LayerType:
        return TransposedConvolution(geometry, positions)  # its bias is a layer of its own

    known = weight_type if groups == 1 else None
    return FunctionCall(inputs, weight, bias, known, lone_bias(bias, trailing=False))
