"""A linear change of a layer's inputs, the same at every position of a unit before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class InputMap:
    """A linear map between the units of the layer before, applied to a layer's inputs.

    A layer that reads another has ``inputs / units`` columns next to each other for each unit of
    that other layer: one after a linear layer, and one for each element of the kernel, or of the
    feature map that was flattened, after a convolution. The map mixes units, and treats all columns
    of a unit alike. A bias column is left alone.

    Attributes:
        units: The map ``T``, of shape ``(units, units)``.
        inputs: Number of columns that are mapped, which come first.

    Example:
        >>> swap = InputMap(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), inputs=4)
        >>> swap.on_columns(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]))
        tensor([[3., 4., 1., 2., 5.]])
    """

    units: Tensor
    inputs: int

    def on_columns(self, matrix: Tensor) -> Tensor:
        """Multiplies a matrix by the map from the right.

        Args:
            matrix: A tensor of shape ``(rows, columns)``, with any number of rows.

        Returns:
            ``matrix @ kron(T, I)``, of the same shape and dtype.
        """
        blocks = matrix[:, : self.inputs].reshape(len(matrix), len(self.units), -1)
        mapped = (blocks.mT @ self.units.to(matrix)).mT  # one product for all rows
        return torch.cat([mapped.flatten(1), matrix[:, self.inputs :]], dim=1)

    @property
    def transposed(self) -> InputMap:
        """The transposed map ``T'``."""
        return InputMap(self.units.mT, self.inputs)
