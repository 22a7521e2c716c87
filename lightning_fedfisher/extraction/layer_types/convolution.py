"""Convolutions in one, two and three dimensions, with and without groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import grad
from typing_extensions import override

from lightning_fedfisher.extraction.layer_types.base import (
    FunctionCall,
    KroneckerLayer,
    LayerType,
    append_ones,
    flatten_positions,
)
from lightning_fedfisher.extraction.layer_types.conv_geometry import ConvGeometry
from lightning_fedfisher.extraction.layer_types.scale_shift import lone_bias

# Entries of a patch above which its second moment is taken apart into channels and kernel: a
# matrix of 1024 rows takes 4 MB, and a second to decompose.
_LARGEST_PATCH = 1024


@dataclass(frozen=True)
class Convolution(KroneckerLayer):
    """A convolution without groups, in any number of spatial dimensions.

    Attributes:
        geometry: Kernel size, stride, padding and dilation.
        has_bias: Whether the last column of the matrix is a bias.
        channels: Number of input channels.

    Example:
        >>> import torch
        >>> geometry = ConvGeometry.from_arguments(kernel=[2], stride=1, padding=0, dilation=1)
        >>> inputs, gradients = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.ones(1, 1, 1, 2)
        >>> Convolution(geometry, has_bias=True).per_sample_gradients(inputs, gradients, samples=1)
        tensor([[[3., 5., 2.]]])
    """

    geometry: ConvGeometry
    has_bias: bool
    channels: int = 1

    @property
    @override
    def kfac_kind(self) -> str:
        elements = math.prod(self.geometry.kernel)
        large = elements > 1 and elements * self.channels > _LARGEST_PATCH
        return "convolution_kronecker" if large else self.kind

    @override
    def channel_axis(self, ndim: int) -> int | None:
        return 1

    @override
    def unfold_inputs(self, inputs: Tensor, samples: int) -> Tensor:
        patches = self.geometry.unfold(inputs)
        patches = append_ones(patches, 0) if self.has_bias else patches
        return patches.reshape(len(patches), samples, -1).transpose(0, 1)

    @override
    def unfold_inputs_at(self, inputs: Tensor, samples: int, positions: Tensor) -> Tensor:
        patches = self.geometry.unfold_at(inputs, samples, positions)
        return append_ones(patches, 1) if self.has_bias else patches

    @override
    def unfold_gradient(self, gradient: Tensor, samples: int) -> Tensor:
        return flatten_positions(gradient, samples)

    @override
    def peak_numel(self, inputs: Tensor, gradients: Tensor) -> int:
        return inputs.numel() * self.geometry.overlap


@dataclass(frozen=True)
class GroupedConvolution(LayerType):
    """A convolution whose output channels see only the input channels of their own group.

    Its gradient is a product within each group, but not as a whole, so it has no Kronecker factors.

    Attributes:
        geometry: Kernel size, stride, padding and dilation.
        has_bias: Whether the last column of the matrix is a bias.
        groups: Number of groups.
    """

    geometry: ConvGeometry
    has_bias: bool
    groups: int
    title: ClassVar[str] = "a grouped convolution"

    @override
    def per_sample_gradients(self, inputs: Tensor, gradients: Tensor, samples: int) -> Tensor:
        directions, outputs = len(gradients), gradients.shape[2]
        images = inputs.expand(directions, *inputs.shape).flatten(0, 2)
        by_filter = gradients.flatten(0, 2)
        few = by_filter[0].numel() <= _FEW_POSITIONS * math.prod(self.geometry.kernel)
        if inputs.shape[1] == outputs == self.groups and few:
            found = self.geometry.correlate(images, by_filter)
        else:
            found = self._filter_gradients(images, by_filter, inputs.shape[1] // self.groups)
        columns = found.reshape(directions * len(inputs), outputs, -1)
        if self.has_bias:
            biases = by_filter.flatten(1).sum(1).view(len(columns), outputs, 1)
            columns = torch.cat([columns, biases], dim=2)
        return columns.view(directions * samples, -1, *columns.shape[1:]).sum(1)

    def _filter_gradients(self, images: Tensor, by_filter: Tensor, channels: int) -> Tensor:
        """The gradient of each filter, from ``channels`` channels of the images after each other.

        PyTorch computes the weight gradient of a grouped convolution. All images together are one
        image with so many times the groups, and each has its own filters.
        """
        return _WEIGHT_GRADIENTS[len(self.geometry.kernel) - 1](
            self.geometry.pad(images.unsqueeze(0)),
            (len(by_filter), channels, *self.geometry.kernel),
            by_filter.unsqueeze(0),
            stride=self.geometry.stride,
            dilation=self.geometry.dilation,
            groups=len(images) // channels,
        )


# Positions of a channel, as a multiple of its kernel's elements, up to which a product for each
# element takes no longer than PyTorch's weight gradient, which is meant for few and large images.
_FEW_POSITIONS = 8
_WEIGHT_GRADIENTS: tuple[Callable[..., Tensor], ...] = (
    grad.conv1d_weight,
    grad.conv2d_weight,
    grad.conv3d_weight,
)


def read_convolution(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> FunctionCall | None:
    """Reads the arguments of `torch.nn.functional.conv1d`, ``conv2d`` and ``conv3d``.

    Returns:
        The call, or None if its input has no batch dimension.
    """
    if inputs.ndim != weight.ndim:
        return None
    geometry = ConvGeometry.from_arguments(weight.shape[2:], stride, padding, dilation)

    def weight_type(has_bias: bool) -> LayerType:
        if groups == 1:
            return Convolution(geometry, has_bias, weight.shape[1])
        return GroupedConvolution(geometry, has_bias, groups)

    return FunctionCall(inputs, weight, bias, weight_type, lone_bias(bias, trailing=False))
