"""What a tensor of an update was before it was packed (`compression`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_fedfisher.curvature.powers import damping_of, tensor_power
from lightning_fedfisher.update.header import QUANTIZED_TYPES, QuantizedTensor
from lightning_fedfisher.update.integer_coding import decode
from lightning_fedfisher.update.roots import matrix_of_root, root_entries, unflatten_root
from lightning_fedfisher.update.tensor_checks import StoredRole, largest_of, value_limit


def restore(
    stored: Tensor,
    quantized: QuantizedTensor | None,
    shape: tuple[int, ...],
    role: StoredRole,
    power: float = 1.0,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    damping: float = 0.0,
) -> Tensor:
    """Restores a tensor, or its part in a power of the curvature.

    Args:
        stored: What lies in the file: the tensor, or its bytes, from a stranger.
        quantized: How it was quantized; None if it was not.
        shape: Shape of the tensor.
        role: What the tensor is.
        power: Power that the curvature is raised to.
        device: Where to work; the CPU if not given.
        dtype: Type to work in; that of the tensor if not given.
        damping: Part of its mean diagonal entry by which a factor is damped before.

    Returns:
        The tensor, up to rounding if it was quantized.

    Raises:
        ValueError: If the bytes are not those of such a tensor, or it would be too large.
    """
    if quantized is None:
        tensor = stored.to(device=device, dtype=dtype)
        if role == "weights" or role == "mean":
            return tensor
        return tensor_power(tensor, role, power, damping)
    dtype = dtype or QUANTIZED_TYPES[quantized.dtype]
    numbers = decode_root(stored, quantized, shape, role)
    entries = numbers.to(torch.promote_types(dtype, torch.float32)).mul_(quantized.step)
    if role == "factor":
        root = unflatten_root(entries, shape[0], quantized.rank).to(device)
        tail = quantized.tail
        if damping:
            squares = root.square().sum(0)
            tail += damping_of(squares + tail * (squares > 0), damping)
        return matrix_of_root(root, tail, power).to(dtype)
    if role == "values":
        entries = entries.abs_().pow_(2 * power)
    return entries.view(shape).to(device, dtype)


def decode_root(
    payload: Tensor, quantized: QuantizedTensor, shape: tuple[int, ...], role: StoredRole
) -> Tensor:
    """Decodes what a tensor was rounded to, and makes sure that the tensor can be used.

    Args:
        payload: Its bytes, from a stranger.
        quantized: How it was quantized.
        shape: Shape of the tensor.
        role: What the tensor is.

    Returns:
        The steps in each entry of the tensor's root, ``int32`` in one dimension.

    Raises:
        ValueError: If the bytes are not those of such a tensor, or it would be too large.
    """
    if role == "factor" and quantized.rank > shape[0]:
        raise ValueError(f"a matrix of {shape[0]} rows has no rank of {quantized.rank}")
    count = root_entries(shape[0], quantized.rank) if role == "factor" else math.prod(shape)
    numbers = decode(payload, count)
    largest = largest_of_root(numbers, quantized, role)
    if not largest <= (limit := value_limit(role, QUANTIZED_TYPES[quantized.dtype])):
        raise ValueError(f"it holds values up to {largest:.1e}, more than {limit:.1e}")
    if quantized.step > torch.finfo(torch.float32).max:  # of which a multiple by zero is no number
        raise ValueError(f"its step is {quantized.step:.1e}")
    return numbers


def largest_of_root(numbers: Tensor, quantized: QuantizedTensor, role: StoredRole) -> float:
    """Bounds the absolute values of a tensor by those of its root.

    Args:
        numbers: The steps in each entry of the root, as `decode_root` returns them.
        quantized: How the tensor was quantized.
        role: What the tensor is.

    Returns:
        A number that no entry of the tensor exceeds.

    Example:
        >>> steps = torch.tensor([3, -4], dtype=torch.int32)
        >>> largest_of_root(steps, QuantizedTensor(0.5, "float32"), "weights")
        2.0
    """
    largest = largest_of(numbers) * quantized.step
    if role in ("factor", "values"):
        rows = quantized.rank if role == "factor" else 1
        largest = largest * largest * rows + quantized.tail
    return largest
