"""Embeddings: tables with a row of weights for each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.extraction.layer_types.base import FunctionCall, SparseLayer


@dataclass(frozen=True)
class Embedding(SparseLayer):
    """An embedding, whose matrix has a row for each token.

    A sample reads few tokens, so that most rows of its gradient are zero.

    Attributes:
        tokens: Number of rows of the matrix.
        padding: Token whose row gets no gradient, or None.

    Example:
        >>> tokens, gradients = torch.tensor([[2, 0, 2]]), torch.ones(1, 1, 3, 1)
        >>> Embedding(tokens=3, padding=None).per_sample_gradients(tokens, gradients, samples=1)
        tensor([[[1.],
                 [0.],
                 [2.]]])
    """

    tokens: int
    padding: int | None
    kind: ClassVar[str] = "embedding_kronecker"

    @override
    def sample_axes(self, ndim: int) -> int:
        return ndim

    @override
    def per_sample_gradients(self, inputs: Tensor, gradients: Tensor, samples: int) -> Tensor:
        owners, tokens, rows = self.nonzero_rows(inputs, gradients, samples)
        count = len(gradients) * samples
        matrices = rows.new_zeros(count * self.tokens, rows.shape[1])
        matrices.index_add_(0, owners * self.tokens + tokens, rows)
        return matrices.view(count, self.tokens, -1)

    @override
    def nonzero_rows(
        self, inputs: Tensor, gradients: Tensor, samples: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, count = inputs.reshape(-1).repeat(len(gradients)), len(gradients) * samples
        owners = torch.arange(count, device=tokens.device).repeat_interleave(len(tokens) // count)
        rows = gradients.reshape(len(tokens), -1)
        if self.padding is None:
            return owners, tokens, rows
        read = tokens != self.padding
        return owners[read], tokens[read], rows[read]


def read_embedding(
    inputs: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> FunctionCall | None:
    """Reads the arguments of `torch.nn.functional.embedding`.

    Returns:
        The call, or None with `max_norm`, which changes the weight during the call.
    """
    if max_norm is not None:
        return None
    tokens = len(weight)
    # A negative index counts from the end, as it does in the function itself.
    padding = padding_idx if padding_idx is None or padding_idx >= 0 else tokens + padding_idx
    return FunctionCall(inputs, weight, None, lambda has_bias: Embedding(tokens, padding), None)
