"""How a convolution slides over its input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class ConvGeometry:
    """How a convolution slides, in each spatial dimension.

    Attributes:
        kernel: size.
        stride: between positions.
        padding: zeros before and after.
        dilation: between a kernel's elements.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(
        cls,
        kernel: Sequence[int],
        stride: int | Sequence[int],
        padding: int | str | Sequence[int],
        dilation: int | Sequence[int],
    ) -> Self:
        """Reads the arguments of a convolution.

        Args:
            kernel: size, in each dimension.
            stride: one for all dimensions, or one for each.
            padding: the same, or ``"same"`` or ``"valid"``.
            dilation: as the stride.

        Returns:
            How it slides.
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
    def growth(self) -> int:
        """How many times an image is seen, at most."""
        return max(1, math.prod(self.kernel) // math.prod(self.stride))

    def patches(self, image: Tensor) -> Tensor:
        """What each position sees: ``(channels * elements, batch, positions)``."""
        sides = [side for pair in reversed(self.padding) for side in pair]
        image = functional.pad(image, sides).contiguous()
        batch, channels, *sizes = image.shape
        steps = image.stride()[2:]
        places = [
            (size - d * (k - 1) - 1) // s + 1
            for size, k, s, d in zip(sizes, self.kernel, self.stride, self.dilation, strict=True)
        ]
        seen = image.as_strided(
            (channels, *self.kernel, batch, *places),
            (
                image.stride(1),
                *(step * d for step, d in zip(steps, self.dilation, strict=True)),
                image.stride(0),
                *(step * s for step, s in zip(steps, self.stride, strict=True)),
            ),
        )
        return seen.reshape(channels * math.prod(self.kernel), batch, -1)


def _spatial(value: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    """A number for each spatial dimension."""
    if isinstance(value, int):
        return (value,) * dimensions
    return tuple(value) * (dimensions if len(value) == 1 else 1)
