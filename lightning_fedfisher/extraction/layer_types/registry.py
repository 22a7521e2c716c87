"""Every function whose parameters are understood, and its reader.

To add a layer type, write one file with a `LayerType` and a reader (a function with the signature
of the `torch.nn.functional` function that it reads), and add a row to `READERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_fedfisher.extraction.layer_types.attention import open_attention
from lightning_fedfisher.extraction.layer_types.base import FunctionCall
from lightning_fedfisher.extraction.layer_types.convolution import read_convolution
from lightning_fedfisher.extraction.layer_types.embedding import read_embedding
from lightning_fedfisher.extraction.layer_types.linear import read_known_linear, read_linear
from lightning_fedfisher.extraction.layer_types.normalization import (
    read_batch_norm,
    read_group_norm,
    read_layer_norm,
    read_rms_norm,
)
from lightning_fedfisher.extraction.layer_types.recurrence import known_linear
from lightning_fedfisher.extraction.layer_types.recurrent import RECURRENT
from lightning_fedfisher.extraction.layer_types.transposed_convolution import (
    read_transposed_convolution,
)
from lightning_fedfisher.extraction.layer_types.transposed_linear import (
    read_product,
    read_shifted_product,
)

READERS: Mapping[Callable[..., Any], Callable[..., FunctionCall | None]] = {
    functional.linear: read_linear,
    known_linear: read_known_linear,
    torch.matmul: read_product,
    torch.mm: read_product,
    Tensor.matmul: read_product,
    Tensor.mm: read_product,
    Tensor.__matmul__: read_product,
    torch.addmm: read_shifted_product,
    Tensor.addmm: read_shifted_product,
    functional.conv1d: read_convolution,
    functional.conv2d: read_convolution,
    functional.conv3d: read_convolution,
    functional.conv_transpose1d: read_transposed_convolution,
    functional.conv_transpose2d: read_transposed_convolution,
    functional.conv_transpose3d: read_transposed_convolution,
    functional.embedding: read_embedding,
    functional.batch_norm: read_batch_norm,
    functional.layer_norm: read_layer_norm,
    functional.rms_norm: read_rms_norm,
    functional.group_norm: read_group_norm,
}
"""The reader of each function. A reader returns None for a form of call that it does not know."""

OPENED: Mapping[Callable[..., Any], Callable[..., Any]] = {
    functional.multi_head_attention_forward: open_attention,
    **RECURRENT,
}
"""What stands for each function that hides calls of the above: the same function, made of such
calls. It returns NotImplemented for a form of call that it does not know."""


def read_call(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> FunctionCall | None:
    """Finds out what a function call does with its weight and bias.

    Args:
        func: Any function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        The call, or None if the function, or this form of calling it, is not known.

    Example:
        >>> x, weight = torch.ones(1, 2), torch.ones(3, 2)
        >>> call = read_call(functional.linear, (x, weight), {})
        >>> call.weight_type(False)
        Linear(has_bias=False)
        >>> read_call(functional.relu, (x,), {}) is None
        True
    """
    reader = READERS.get(func)
    return None if reader is None else reader(*args, **kwargs)
