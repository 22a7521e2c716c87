"""Linear layers whose weight has inputs on the rows, as matrix products have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.extraction.layer_types.base import (
    FunctionCall,
    KroneckerLayer,
    LayerType,
)
from lightning_fedfisher.extraction.layer_types.scale_shift import lone_bias


@dataclass(frozen=True)
class TransposedLinear(KroneckerLayer):
    """``y = x W`` for features in the last dimension, with any dimensions before it.

    Its bias has an entry for each column of the matrix, and so is a layer of its own.

    Example:
        >>> import torch
        >>> inputs, gradients = torch.tensor([[1.0, 2.0]]), torch.tensor([[[3.0]]])
        >>> TransposedLinear().per_sample_gradients(inputs, gradients, samples=1)
        tensor([[[3.],
                 [6.]]])
    """

    kind: ClassVar[str] = "transposed_kronecker"
    title: ClassVar[str] = "a product with inputs on its rows"
    inputs_are_rows: ClassVar[bool] = True

    @override
    def sample_axes(self, ndim: int) -> int:
        return ndim - 1

    @override
    def count_positions(self, inputs: Tensor, gradient: Tensor) -> int:
        return inputs.numel() // inputs.shape[-1]

    @override
    def unfold_inputs(self, inputs: Tensor, samples: int) -> Tensor:
        return inputs.reshape(samples, -1, inputs.shape[-1]).mT

    @override
    def unfold_gradient(self, gradient: Tensor, samples: int) -> Tensor:
        return gradient.reshape(samples, -1, gradient.shape[-1]).mT


def read_product(*operands: Any, **options: Any) -> FunctionCall | None:
    """Reads the arguments of `torch.matmul`.

    Returns:
        The call. None if what is on the right is no matrix, or what is on the left has no batch
        dimension.
    """
    if options or len(operands) != 2 or not all(isinstance(x, Tensor) for x in operands):
        return None
    inputs, weight = operands
    if inputs.ndim < 2 or weight.ndim != 2:
        return None
    return FunctionCall(inputs, weight, None, _weight_type, None)


def read_shifted_product(*operands: Any, **options: Any) -> FunctionCall | None:
    """Reads the arguments of `torch.addmm`.

    Returns:
        The call. None if it has options, or if what is added to the product is no vector.
    """
    product = read_product(*operands[1:], **options)
    if product is None or operands[0].shape != operands[2].shape[1:]:
        return None
    return replace(product, bias=operands[0], bias_type=lone_bias(operands[0], trailing=True))


def _weight_type(has_bias: bool) -> LayerType:
    return TransposedLinear()
