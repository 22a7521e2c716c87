"""What every accumulator does: it adds up tensors over samples, which become a curvature.

The sums are additive over batches and processes, and are divided by the number of samples once, at
the end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.extraction.tracing.recorder import LayerCall
from lightning_fedfisher.layers import Layer


class Accumulator(ABC):
    """Sums over samples of the tensors that define one layer's curvature."""

    def __init__(self, layer: Layer, kind: type[Curvature], like: Tensor) -> None:
        """Starts at zero.

        Args:
            layer: The layer.
            kind: Kind of curvature that the sums become.
            like: A tensor that gives the dtype and device of the sums.
        """
        self._kind, self._layer = kind, layer
        shapes = kind.tensor_shapes(layer.shape, layer.kernel)
        self._sums = {name: like.new_zeros(shape) for name, shape in shapes.items()}

    @property
    def sums(self) -> dict[str, Tensor]:
        """The sums so far, by field name of the curvature."""
        return self._sums

    @abstractmethod
    def add(self, calls: Sequence[LayerCall], samples: int) -> None:
        """Adds what the backward passes through one forward pass brought.

        Args:
            calls: All calls of the layer in the forward pass that a gradient came back to.
            samples: Number of samples of the forward pass. These directions are all they have.
        """

    def finish(self, sums: Mapping[str, Tensor], count: int) -> Curvature:
        """Turns sums over all processes into a curvature.

        Args:
            sums: The sums of all processes together, by field name. They are used up: the curvature
                takes their memory.
            count: Number of samples of all processes together.

        Returns:
            The curvature, averaged over samples.
        """
        means = {name: total.div_(count) for name, total in sums.items()}
        return self._kind.from_tensors(means, self._layer.shape, self._layer.kernel)


class GradientAccumulator(Accumulator):
    """Sums that can be computed from per-sample gradients alone, however these were found."""

    @abstractmethod
    def add_gradients(self, gradients: Tensor) -> None:
        """Adds per-sample gradients.

        Args:
            gradients: A tensor of shape ``(samples, rows, columns)``.
        """
