"""Kernel size, stride, padding and dilation of a convolution, and its patches (im2col)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class ConvGeometry:
    """Kernel size, stride, padding and dilation of a convolution, in each spatial dimension.

    Attributes:
        kernel: Kernel size.
        stride: Distance between neighbouring positions of the kernel.
        padding: Zeros before and after the input.
        dilation: Distance between neighbouring elements of the kernel.

    Example:
        >>> import torch
        >>> geometry = ConvGeometry.from_arguments(kernel=[2], stride=1, padding=0, dilation=1)
        >>> geometry.unfold(torch.tensor([[[1.0, 2.0, 3.0]]])).squeeze(1)
        tensor([[1., 2.],
                [2., 3.]])
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @classmethod
    def from_arguments(
        cls,
        kernel: Sequence[int],
        stride: int | Sequence[int],
        padding: int | str | Sequence[int],
        dilation: int | Sequence[int],
    ) -> Self:
        """Reads the arguments of a convolution as `torch.nn.functional.conv2d` takes them.

        Args:
            kernel: Kernel size in each spatial dimension.
            stride: One number for all dimensions, or one for each.
            padding: Zeros on either side: one number for all dimensions, one for each, ``"same"``
                or ``"valid"``.
            dilation: One number for all dimensions, or one for each.

        Returns:
            The geometry, with every number written out.
        """
        dilations = _spatial(dilation, len(kernel))
        if isinstance(padding, str):
            reach = [
                d * (k - 1) * (padding == "same") for d, k in zip(dilations, kernel, strict=True)
            ]
            # An even kernel adds one more zero after than before.
            sides = tuple((r // 2, r - r // 2) for r in reach)
        else:
            sides = tuple((p, p) for p in _spatial(padding, len(kernel)))
        return cls(tuple(kernel), _spatial(stride, len(kernel)), sides, dilations)

    @property
    def overlap(self) -> int:
        """Number of patches that an entry of the input is part of, about and at least 1."""
        return max(1, math.prod(self.kernel) // math.prod(self.stride))

    def unfold_at(self, image: Tensor, samples: int, positions: Tensor) -> Tensor:
        """Copies out the patches at some positions of each sample, and no others.

        Args:
            image: A tensor of shape ``(samples * frames, channels, *spatial)``.
            samples: Number of samples.
            positions: Indices of positions, the frames of a sample after each other, of shape
                ``(samples, some)``.

        Returns:
            A tensor of shape ``(samples, channels * kernel elements, some)``.

        Example:
            >>> import torch
            >>> geometry = ConvGeometry.from_arguments(kernel=[2], stride=1, padding=1, dilation=1)
            >>> geometry.unfold_at(torch.tensor([[[1.0, 2.0]]]), 1, torch.tensor([[0, 1]]))
            tensor([[[0., 1.],
                     [1., 2.]]])
        """
        sizes = image.shape[2:]
        counts = self._positions(sizes)
        frames, remaining = positions // math.prod(counts), positions % math.prod(counts)
        index, inside = frames.unsqueeze(1), torch.ones_like(frames, dtype=torch.bool).unsqueeze(1)
        # From the first dimension to the last, as the numbering of positions runs.
        for axis, size in enumerate(sizes):
            span = math.prod(counts[axis + 1 :])
            start = remaining // span * self.stride[axis] - self.padding[axis][0]
            remaining = remaining % span
            elements = torch.arange(self.kernel[axis], device=image.device) * self.dilation[axis]
            place = start.unsqueeze(1) + elements.unsqueeze(1)
            within = (place >= 0) & (place < size)
            place = place.clamp(0, size - 1)
            index = (index.unsqueeze(2) * size + place.unsqueeze(1)).flatten(1, 2)
            inside = (inside.unsqueeze(2) & within.unsqueeze(1)).flatten(1, 2)
        elements_first = index.flatten(1).unsqueeze(1)  # kernel elements, then positions
        apart = image.reshape(samples, -1, image.shape[1], math.prod(sizes)).transpose(1, 2)
        patches = apart.flatten(2).gather(2, elements_first.expand(-1, image.shape[1], -1))
        patches = patches * inside.flatten(1).unsqueeze(1).to(patches.dtype)
        return patches.reshape(samples, -1, positions.shape[1])

    def correlate(self, channels: Tensor, gradients: Tensor) -> Tensor:
        """Computes the gradient of each channel's own filter, kernel element by kernel element.

        Args:
            channels: Channels of images, of shape ``(channels, *spatial)``.
            gradients: Gradients at the positions of each, of shape ``(channels, *positions)``.

        Returns:
            A tensor of shape ``(channels, *kernel)``.

        Example:
            >>> import torch
            >>> geometry = ConvGeometry.from_arguments(kernel=[2], stride=1, padding=0, dilation=1)
            >>> geometry.correlate(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 10.0]]))
            tensor([[21., 32.]])
        """
        # Channels last: all of them are multiplied at once, and there are many.
        image, at = (tensor.movedim(0, -1).contiguous() for tensor in (channels, gradients))
        found = image.new_zeros(*self.kernel, len(channels))
        axes = [
            [(e, *self._meets(axis, e, image, at)) for e in range(size)]
            for axis, size in enumerate(self.kernel)
        ]
        for meets in itertools.product(*axes):
            element, pixels, positions = zip(*meets, strict=True)
            if all(some.start < some.stop for some in positions):  # else it meets padding alone
                products = image[pixels] * at[positions]
                torch.sum(products.flatten(0, -2), 0, out=found[element])
        return found.movedim(-1, 0)

    def _meets(self, axis: int, element: int, image: Tensor, at: Tensor) -> tuple[slice, slice]:
        """Which pixels along an axis an element of the kernel meets, and at which positions."""
        stride, offset = self.stride[axis], element * self.dilation[axis] - self.padding[axis][0]
        first = max(0, -(offset // stride))
        stop = max(first, min(at.shape[axis], (image.shape[axis] - 1 - offset) // stride + 1))
        start = first * stride + offset
        return slice(start, stop * stride + offset, stride), slice(first, stop)

    def _positions(self, sizes: Sequence[int]) -> list[int]:
        """Counts the positions of the kernel in each dimension of an image of this size."""
        return [
            (size + sum(sides) - d * (k - 1) - 1) // s + 1
            for size, k, s, sides, d in zip(
                sizes, self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        ]

    def pad(self, image: Tensor) -> Tensor:
        """Puts zeros before and after an image of shape ``(batch, channels, *spatial)``."""
        sides = [side for pair in reversed(self.padding) for side in pair]
        return functional.pad(image, sides) if any(sides) else image

    def unfold(self, image: Tensor) -> Tensor:
        """Copies out the patch that the kernel covers at each of its positions.

        Args:
            image: A tensor of shape ``(batch, channels, *spatial)``.

        Returns:
            A tensor of shape ``(channels * kernel elements, batch, positions)``.
        """
        positions = self._positions(image.shape[2:])
        image = self.pad(image).contiguous()
        batch, channels = image.shape[:2]
        steps = image.stride()[2:]
        patches = image.as_strided(
            (channels, *self.kernel, batch, *positions),
            (
                image.stride(1),
                *(step * d for step, d in zip(steps, self.dilation, strict=True)),
                image.stride(0),
                *(step * s for step, s in zip(steps, self.stride, strict=True)),
            ),
        )
        return patches.reshape(channels * math.prod(self.kernel), batch, -1)


def _spatial(value: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    """Repeats a number for each spatial dimension."""
    if isinstance(value, int):
        return (value,) * dimensions
    return tuple(value) * (dimensions if len(value) == 1 else 1)
