"""The calls that layers end in, read: which operation on which input, weight and bias.

One reader for each function of `torch.nn.functional` that is known, with that function's own
signature. A call that is known in general but not in this form is read as None.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional

from lightning_fedfisher.errors import UnsupportedModelError
from lightning_fedfisher.extraction.layer_types.base import (
    Convolution,
    Embedding,
    GroupedConvolution,
    LayerType,
    Linear,
    ScaleShift,
    TransposedConvolution,
)
from lightning_fedfisher.extraction.layer_types.conv_geometry import ConvGeometry


@dataclass(frozen=True)
class FunctionCall:
    """A call of a known function, as far as the gradient of its parameters goes.

    Attributes:
        inputs: of the call.
        weight: as given.
        bias: as given.
        operation: on the weight's matrix, given whether that has the bias as a column; None if it
            is not known.
        shift: what the call does with a bias that stands alone.
    """

    inputs: Tensor
    weight: Tensor | None
    bias: Tensor | None
    operation: Callable[[bool], LayerType] | None
    shift: LayerType | None


def read_call(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> FunctionCall | None:
    """Reads a call.

    Args:
        func: any function.
        args: positional arguments.
        kwargs: arguments by keyword.

    Returns:
        What it does; None if it is not known.
    """
    reader = _READERS.get(func)
    return None if reader is None else reader(*args, **kwargs)


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> FunctionCall | None:
    if weight.ndim != 2:
        return None
    return FunctionCall(inputs, weight, bias, Linear, _shift(bias, trailing=True))


def _convolution(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> FunctionCall | None:
    if inputs.ndim != weight.ndim:
        return None
    window = ConvGeometry.of(weight.shape[2:], stride, padding, dilation)

    def operation(has_bias: bool) -> LayerType:
        if groups == 1:
            return Convolution(window, has_bias)
        return GroupedConvolution(window, has_bias, groups)

    return FunctionCall(inputs, weight, bias, operation, _shift(bias, trailing=False))


def _transposed(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> FunctionCall | None:
    if inputs.ndim != weight.ndim:
        return None
    window = ConvGeometry.of(weight.shape[2:], stride, padding, dilation)
    positions = tuple(inputs.shape[2:])

    def operation(has_bias: bool) -> LayerType:
        return TransposedConvolution(window, positions)

    return FunctionCall(
        inputs, weight, bias, operation if groups == 1 else None, _shift(bias, trailing=False)
    )


def _embedding(
    inputs: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> FunctionCall | None:
    if max_norm is not None:
        return None
    tokens = len(weight)
    # The function counts from the end where the index is negative, as -1 stands for none below it.
    padding = padding_idx if padding_idx is None or padding_idx >= 0 else tokens + padding_idx
    return FunctionCall(inputs, weight, None, lambda has_bias: Embedding(tokens, padding), None)


def _batch_norm(
    inputs: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> FunctionCall | None:
    if training:
        raise UnsupportedModelError(
            [
                "batch_norm normalises by the statistics of the batch in eval mode, so that there "
                "is no curvature of one sample: keep running statistics"
            ]
        )
    normalised = partial(
        functional.batch_norm, running_mean=running_mean, running_var=running_var, eps=eps
    )
    return _normalisation(inputs, weight, bias, normalised, trailing=False)


def _layer_norm(
    inputs: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> FunctionCall:
    normalised = partial(functional.layer_norm, normalized_shape=list(normalized_shape), eps=eps)
    return _normalisation(inputs, weight, bias, normalised, trailing=True)


def _rms_norm(
    inputs: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> FunctionCall:
    normalised = partial(functional.rms_norm, normalized_shape=list(normalized_shape), eps=eps)
    return _normalisation(inputs, weight, None, normalised, trailing=True)


def _group_norm(
    inputs: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> FunctionCall:
    normalised = partial(functional.group_norm, num_groups=num_groups, eps=eps)
    return _normalisation(inputs, weight, bias, normalised, trailing=False)


def _normalisation(
    inputs: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalised: Callable[[Tensor], Tensor],
    trailing: bool,
) -> FunctionCall:
    def operation(has_bias: bool) -> LayerType:
        assert weight is not None
        return ScaleShift(normalised, has_bias, tuple(weight.shape), trailing)

    return FunctionCall(inputs, weight, bias, operation, _shift(bias, trailing))


def _shift(bias: Tensor | None, trailing: bool) -> LayerType | None:
    return None if bias is None else ScaleShift(None, True, tuple(bias.shape), trailing)


# Attention hides its linear maps behind a check for overloads; this is the same code without.
open_attention = types.FunctionType(
    functional.multi_head_attention_forward.__code__,
    {**vars(functional), "has_torch_function": lambda relevant: False},
    argdefs=functional.multi_head_attention_forward.__defaults__,
)

_READERS: dict[Any, Callable[..., FunctionCall | None]] = {
    functional.linear: _linear,
    functional.conv1d: _convolution,
    functional.conv2d: _convolution,
    functional.conv3d: _convolution,
    functional.conv_transpose1d: _transposed,
    functional.conv_transpose2d: _transposed,
    functional.conv_transpose3d: _transposed,
    functional.embedding: _embedding,
    functional.batch_norm: _batch_norm,
    functional.layer_norm: _layer_norm,
    functional.rms_norm: _rms_norm,
    functional.group_norm: _group_norm,
}
