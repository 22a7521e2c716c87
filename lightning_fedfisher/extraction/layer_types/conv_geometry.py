"""Kernel size, stride, padding and dilation of a convolution, and its patches (im2col)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

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

    def unfold(self, image: Tensor) -> Tensor:
        """Copies out the patch that the kernel covers at each of its positions.

        Args:
            image: A tensor of shape ``(batch, channels, *spatial)``.

        Returns:
            A tensor of shape ``(channels * kernel elements, batch, positions)``.
        """
        sides = [side for pair in reversed(self.padding) for side in pair]
        image = functional.pad(image, sides).contiguous()
        batch, channels, *sizes = image.shape
        steps = image.stride()[2:]
        positions = [
            (size - d * (k - 1) - 1) // s + 1
            for size, k, s, d in zip(sizes, self.kernel, self.stride, self.dilation, strict=True)
        ]
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
