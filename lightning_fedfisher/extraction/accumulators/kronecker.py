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

from lightning_fedfisher.extraction.accumulators.base import Accumulator
from lightning_fedfisher.extraction.accumulators.per_sample_gradients import in_chunks
from lightning_fedfisher.extraction.layer_types.base import KroneckerLayer
from lightning_fedfisher.extraction.tracing.recorder import LayerCall

# Size of a Gram matrix from which it is worth computing its upper blocks only: below, one product
# is faster than several smaller ones that save less than half of its work.
_MIN_SYMMETRIC_SIZE = 128
# Gram matrices are computed in strips of a quarter of their rows, which saves three eighths of the
# work. Strips of fewer than 80 rows make products too small to be fast; with more than 512 rows,
# more strips save more and cost nothing.
_STRIPS, _MIN_STRIP, _MAX_STRIP = 4, 80, 512


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

    @override
    def add(self, calls: Sequence[LayerCall], samples: int) -> None:
        positions = sum(_count_positions(call) for call in calls) // samples
        for call in calls:
            layer_type = call.layer_type
            assert isinstance(layer_type, KroneckerLayer)
            gradient_factor = "column_factor" if layer_type.inputs_are_rows else "row_factor"
            for (part,), n in in_chunks([call], samples):
                self._add_inputs(layer_type.unfold_inputs(part.inputs, n), 1 / positions)
                if gradient_factor in self.sums:
                    gradients = layer_type.unfold_gradients(part.gradients, n)
                    add_gram(self.sums[gradient_factor], gradients, 1.0)

    def _add_inputs(self, unfolded: Tensor, scale: float) -> None:
        """Adds the second moment of a call's inputs.

        Args:
            unfolded: The inputs by position, of shape ``(samples, features, positions)``.
            scale: Factor that it is multiplied by.
        """
        name = "row_factor" if self._kind.inputs_on == "rows" else "column_factor"
        add_gram(self.sums[name], unfolded, scale)


def _count_positions(call: LayerCall) -> int:
    """Counts the positions of a call, over all samples together."""
    assert isinstance(call.layer_type, KroneckerLayer)
    return call.layer_type.count_positions(call.inputs, call.gradients[0])


def add_gram(sums: Tensor, features: Tensor, scale: float) -> None:
    """Adds the second moment of features, summed over samples and positions.

    Args:
        sums: Symmetric matrix of shape ``(features, features)`` that it is added to, in place.
        features: A tensor of shape ``(samples, features, positions)``.
        scale: Factor that it is multiplied by.
    """
    size = features.shape[1]
    if features.mT.is_contiguous():
        flat = features.mT.reshape(-1, size).mT
    else:
        flat = features.transpose(0, 1).reshape(size, -1)
    if size < _MIN_SYMMETRIC_SIZE or flat.shape[1] < size:
        sums.addmm_(flat, flat.mT, alpha=scale)
        return
    # The matrix is symmetric: what is right of a strip's diagonal block tells what is below it.
    rows = max(_MIN_STRIP, min(_MAX_STRIP, size // _STRIPS))
    for start in range(0, size, rows):
        strip = slice(start, start + rows)
        upper = scale * (flat[strip] @ flat[start:].mT)
        sums[strip, start:] += upper
        sums[start + rows :, strip] += upper[:, rows:].mT
