"""Whether a tensor can be what it is said to be: nobody's curvature is taken at their word."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fedfisher.curvature.base import TensorRole

LARGEST_VALUE = 1e18
"""Of weights and curvature, in size: what float32 can still multiply."""

_ROUNDING = 1e-4  # of the trace, or of the largest entry; more where the type is coarser


def form_of_buffer(name: str) -> TensorRole | None:
    """What a buffer must be: running statistics are squared when they are merged.

    Args:
        name: of the buffer.

    Returns:
        The form; None if nothing is known of it.
    """
    if name.endswith("running_var"):
        return "values"
    return "basis" if name.endswith("running_mean") else None


def flaw(tensor: Tensor, form: TensorRole | None) -> str:
    """What is wrong with a tensor.

    Args:
        tensor: of any type and shape.
        form: what it must be; None if nothing is known of it.

    Returns:
        The reason to refuse it; empty if there is none.
    """
    if not tensor.is_floating_point():
        return ""
    if not torch.isfinite(tensor).all():
        return f"holds {int((~torch.isfinite(tensor)).sum())} values that are not finite"
    if not tensor.numel():
        return ""
    largest, rounding = float(tensor.abs().max()), max(_ROUNDING, torch.finfo(tensor.dtype).eps)
    most = torch.finfo(torch.float32).max if form is None else LARGEST_VALUE
    if largest > most:
        return f"holds values up to {largest:.1e}, more than {most:.2g}"
    if form == "values" and float(tensor.min()) < -rounding * largest:
        return f"holds negative values, down to {float(tensor.min()):.1e}"
    if form == "factor":
        if float((tensor - tensor.mT).abs().max()) > rounding * largest:
            return "is not symmetric"
        # The ridge is far above float32's rounding, which takes half the time.
        exact = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        if not is_semidefinite(exact, rounding):
            return "is not positive semi-definite"
    return ""


def is_semidefinite(matrix: Tensor, rounding: float) -> bool:
    """Whether a symmetric matrix has no negative eigenvalue beyond rounding.

    Args:
        matrix: in float32 or float64.
        rounding: share of the trace that an eigenvalue may be below zero.

    Returns:
        False if one is further below.
    """
    if not matrix.any():
        return True
    ridge = rounding * matrix.trace()
    _, failed = torch.linalg.cholesky_ex(matrix + ridge * torch.eye(len(matrix)).to(matrix))
    return not failed
