"""Sums for K-FAC: the second moments of the two sides of a layer's gradient, or of its inputs.

With rows ``r`` and columns ``c`` (see `layer_types`), the factors are the second moments of ``r``
and of ``c``. Over positions, the side that comes from the inputs is averaged, and the side that
comes from the gradient summed (Grosse & Martens, 2016, with spatially uncorrelated derivatives;
"expand" in Eschenhagen et al., 2023). A layer that is called several times in a forward pass has
the positions of all its calls.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.extraction.accumulators.base import Accumulator
from lightning_fedfisher.extraction.accumulators.gram import GramSum
from lightning_fedfisher.extraction.accumulators.per_sample_gradients import in_chunks
from lightning_fedfisher.extraction.layer_types.base import KroneckerLayer
from lightning_fedfisher.extraction.tracing.recorder import LayerCall
from lightning_fedfisher.layers import Layer


class KroneckerAccumulator(Accumulator):
    """Row and column factors of layers whose gradient is a sum of outer products.

    Of an `InputGram`, which has no row factor, the inputs alone are added up.

    Example:
        >>> import torch
        >>> from lightning_fedfisher.curvature import Kronecker
        >>> from lightning_fedfisher.extraction.layer_types.linear import Linear
        >>> from lightning_fedfisher.layers import Layer
        >>> layer = Layer("fc", (("fc.weight", (1, 2)),))
        >>> accumulator = KroneckerAccumulator(layer, Kronecker, like=torch.ones(()))
        >>> inputs, gradients = torch.tensor([[1.0, 2.0]]), torch.tensor([[[3.0]]])
        >>> accumulator.add([LayerCall(Linear(has_bias=False), inputs, gradients)], samples=1)
        >>> accumulator.sums
        {'row_factor': tensor([[9.]]), 'column_factor': tensor([[1., 2.],
                [2., 4.]])}
    """

    def __init__(self, layer: Layer, kind: type[Curvature], like: Tensor) -> None:
        """Starts at zero; see `Accumulator`."""
        self._kind, self._layer = kind, layer
        shapes = kind.tensor_shapes(layer.shape, layer.kernel)
        self._grams = {name: GramSum(size, like) for name, (size, _) in shapes.items()}

    @property
    @override
    def sums(self) -> dict[str, Tensor]:
        return {name: gram.total() for name, gram in self._grams.items()}

    @override
    def add(self, calls: Sequence[LayerCall], samples: int) -> None:
        positions = sum(_count_positions(call) for call in calls) // samples
        for call in calls:
            layer_type = call.layer_type
            assert isinstance(layer_type, KroneckerLayer)
            gradient_factor = "column_factor" if layer_type.inputs_are_rows else "row_factor"
            for (part,), n in in_chunks([call], samples):
                self._add_inputs(layer_type.unfold_inputs(part.inputs, n), 1 / positions)
                if gradient_factor in self._grams:
                    gradients = layer_type.unfold_gradients(part.gradients, n)
                    self._grams[gradient_factor].add(gradients, 1.0)

    def _add_inputs(self, unfolded: Tensor, scale: float) -> None:
        """Adds the second moment of a call's inputs.

        Args:
            unfolded: The inputs by position, of shape ``(samples, features, positions)``.
            scale: Factor that it is multiplied by.
        """
        name = "row_factor" if self._kind.inputs_on == "rows" else "column_factor"
        self._grams[name].add(unfolded, scale)


def _count_positions(call: LayerCall) -> int:
    """Counts the positions of a call, over all samples together."""
    assert isinstance(call.layer_type, KroneckerLayer)
    return call.layer_type.count_positions(call.inputs, call.gradients[0])
