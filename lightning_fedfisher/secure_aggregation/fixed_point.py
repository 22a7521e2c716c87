"""Numbers as integers modulo ``2**64``: what masks hide, and take away again exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_fedfisher.errors import FedFisherError

_HALF_RING = 2.0**63  # integers of 64 bits from here on count as negative
_FAINT = 256  # steps: up to there, a divisor would be half rounding


def to_fixed(
    tensors: Mapping[str, Tensor],
    clients: int,
    fraction_bits: int = 40,
    limbs: int = 2,
    *,
    divisors: Mapping[str, str],
) -> dict[str, Tensor]:
    """Writes numbers as integers modulo ``2**64``, whose sums wrap around.

    Each entry is off by half a step of ``2**-(limbs * fraction_bits)`` at most, a sum by
    ``clients`` times that. Whoever divides by a sum needs an error that is small beside it: a
    client's divisors of less than 256 steps are written as zero, with all that they divide. For
    sums of `client_sums`, rounding then moves a weight ``W`` merged of the others by
    ``(1 + |W|) / 512`` at most. Clients that are certain leave information of 1e-15 and less, which
    two limbs keep. One limb is enough for its root, as ``fedfisher`` takes.

    Args:
        tensors: Floating-point tensors of one client, as of `client_sums`.
        clients: Number of clients whose tensors are added; their sum must fit.
        fraction_bits: Bits behind the binary point of the first limb, and of each further one.
        limbs: Number of integers for each number; each goes on where the one before it was rounded.
        divisors: By name of a tensor, the name of the tensor of the same shape by which its sum
            will be divided. For sums of `client_sums`, the function of that name tells them. Empty
            if nothing is divided.

    Returns:
        Tensors of ``int64`` and of shape ``(limbs, *shape)``. Adding them wraps around, which adds
        them modulo ``2**64``.

    Raises:
        FedFisherError: If tensors leave no room for the sum, or are not finite; all are named.
        ValueError: If there are no clients, bits or limbs.

    Example:
        >>> sent = [to_fixed({"a": torch.tensor(x)}, clients=2, divisors={}) for x in (0.5, -1.25)]
        >>> from_fixed({"a": sent[0]["a"] + sent[1]["a"]})
        {'a': tensor(-0.7500, dtype=torch.float64)}
    """
    if min(clients, fraction_bits, limbs) < 1:
        raise ValueError(
            "clients, fraction_bits and limbs must be at least 1, got "
            f"{clients}, {fraction_bits} and {limbs}"
        )
    limit = _HALF_RING / clients - clients
    faint = _FAINT * 2.0 ** -(limbs * fraction_bits)
    fixed, offenders = {}, {}
    for name, tensor in tensors.items():
        rest = tensor.double() * 2.0**fraction_bits
        if name in divisors:
            rest = torch.where(tensors[divisors[name]] < faint, 0.0, rest)
        parts = [rest.round()]
        for _ in range(limbs - 1):
            rest = (rest - parts[-1]) * 2.0**fraction_bits
            parts.append(rest.round())
        stacked = torch.stack(parts)
        largest = float(stacked.abs().max()) if stacked.numel() else 0.0
        if not math.isfinite(largest):
            offenders[name] = f"{name} is not finite"
        elif largest >= limit:
            offenders[name] = f"{name} takes integers up to {largest:.4g}, not below {limit:.4g}"
        fixed[name] = stacked.to(torch.int64)
    if offenders:
        raise FedFisherError(
            f"{', '.join(offenders)} hold numbers too large for {clients} clients and "
            f"{fraction_bits} fraction bits, or not finite: take fewer bits in a limb and more "
            "limbs, or a larger sample_unit in client_sums",
            tuple(offenders.values()),
        )
    return fixed


def from_fixed(tensors: Mapping[str, Tensor], fraction_bits: int = 40) -> dict[str, Tensor]:
    """Reads a sum of what `to_fixed` wrote.

    Args:
        tensors: Tensors of ``int64`` and of shape ``(limbs, *shape)``.
        fraction_bits: Bits behind the binary point of each limb, as given to `to_fixed`.

    Returns:
        The numbers in float64, in tensors of shape ``shape``.

    Raises:
        FedFisherError: If tensors are of another type, or without limbs; all are named.

    Example:
        >>> from_fixed({"a": torch.tensor([[3], [0]])}, fraction_bits=1)
        {'a': tensor([1.5000], dtype=torch.float64)}
    """
    odd = {name: t for name, t in tensors.items() if t.dtype != torch.int64 or not t.dim()}
    if odd:
        raise FedFisherError(
            f"{', '.join(odd)} are not int64 of shape (limbs, ...), as of to_fixed",
            [f"{name} is {t.dtype} of shape {tuple(t.shape)}" for name, t in odd.items()],
        )
    numbers = {}
    for name, tensor in tensors.items():
        places = -fraction_bits * torch.arange(1, len(tensor) + 1, dtype=torch.float64)
        numbers[name] = torch.tensordot(places.exp2(), tensor.double(), 1)
    return numbers
