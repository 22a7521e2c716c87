"""Changes of a layer's inputs that keep together what one unit before it gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class InputMap:
    """A linear map ``T`` between units, applied to a layer's inputs.

    The inputs are a block of ``inputs / units`` columns for each unit (see `Source`), and the map
    is the same at every position of a block. A bias column is left alone.

    Attributes:
        units: ``T``, of shape ``(units, units)``.
        inputs: columns that are mapped.
    """

    units: Tensor
    inputs: int

    def on_columns(self, matrix: Tensor) -> Tensor:
        """Multiplies a matrix by the map, from the right.

        Args:
            matrix: of shape ``(any, columns)``.

        Returns:
            ``matrix @ (T x I)``, of the same shape and dtype.
        """
        blocks = matrix[:, : self.inputs].reshape(len(matrix), len(self.units), -1)
        mapped = (blocks.mT @ self.units.to(matrix)).mT  # one product for all rows
        return torch.cat([mapped.flatten(1), matrix[:, self.inputs :]], dim=1)

    @property
    def transposed(self) -> InputMap:
        """The map ``T'``."""
        return InputMap(self.units.mT, self.inputs)
