"""Batch, layer, group and RMS normalisation, with the statistics that a model has in eval mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor
from torch.nn import functional

from lightning_fedfisher.errors import UnsupportedModelError
from lightning_fedfisher.extraction.layer_types.base import FunctionCall, LayerType
from lightning_fedfisher.extraction.layer_types.scale_shift import ScaleShift, lone_bias


def read_batch_norm(
    inputs: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> FunctionCall:
    """Reads the arguments of `torch.nn.functional.batch_norm`.

    Raises:
        UnsupportedModelError: If it normalises by the statistics of several samples.
    """
    if training and len(inputs) == 1:  # a weight that is standardised: no samples are in there
        return FunctionCall(inputs, weight, bias, None, None)
    if training:
        raise UnsupportedModelError(
            [
                "batch_norm normalises by the statistics of the batch in eval mode, so that there "
                "is no curvature of one sample: keep running statistics"
            ]
        )
    normalize = partial(
        functional.batch_norm, running_mean=running_mean, running_var=running_var, eps=eps
    )
    return _scale_shift(inputs, weight, bias, normalize, trailing=False)


def read_layer_norm(
    inputs: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> FunctionCall:
    """Reads the arguments of `torch.nn.functional.layer_norm`."""
    normalize = partial(functional.layer_norm, normalized_shape=list(normalized_shape), eps=eps)
    return _scale_shift(inputs, weight, bias, normalize, trailing=True)


def read_rms_norm(
    inputs: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> FunctionCall:
    """Reads the arguments of `torch.nn.functional.rms_norm`."""
    normalize = partial(functional.rms_norm, normalized_shape=list(normalized_shape), eps=eps)
    return _scale_shift(inputs, weight, None, normalize, trailing=True)


def read_group_norm(
    inputs: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> FunctionCall:
    """Reads the arguments of `torch.nn.functional.group_norm`."""
    normalize = partial(functional.group_norm, num_groups=num_groups, eps=eps)
    return _scale_shift(inputs, weight, bias, normalize, trailing=False)


def _scale_shift(
    inputs: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalize: Callable[[Tensor], Tensor],
    trailing: bool,
) -> FunctionCall:
    """Describes a call that scales and shifts what `normalize` gives."""

    def weight_type(has_bias: bool) -> LayerType:
        assert weight is not None
        return ScaleShift(normalize, has_bias, tuple(weight.shape), trailing)

    return FunctionCall(inputs, weight, bias, weight_type, lone_bias(bias, trailing))
