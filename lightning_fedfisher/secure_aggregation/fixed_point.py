"""Numbers as integers modulo ``2**64``: what masks hide, and take away again exactly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_RING = 2.0**63  # of half of the integers, those not negative
_FAINT = 256  # steps: information up to there would be divided by what is rounding


def to_fixed(
    tensors: Mapping[str, Tensor], clients: int, fraction_bits: int = 40, limbs: int = 2
) -> dict[str, Tensor]:
    """Writes numbers as integers modulo ``2**64``, whose sums wrap around.

    Each entry is off by half a step of ``2**-(limbs * fraction_bits)`` at most, a sum by
    ``clients`` times that. The merge divides by information, so what is off must be small beside
    it: a client's entries of less than 256 steps count as no information, and rounding moves a
    weight ``W`` merged of the others by ``(1 + |W|) / 512`` at most. Clients that are certain
    leave 1e-15 and less, which two limbs keep; one will do for its root, as ``fedfisher`` takes.

    Args:
        tensors: a `client_sums`.
        clients: how many are added; their sum must fit.
        fraction_bits: bits behind the point of the first word, and of each further one.
        limbs: integers for each number, each going on where the one before it was rounded.

    Returns:
        Tensors of ``int64``, of shape ``(limbs, *shape)``; to add them modulo ``2**64`` is to add
        them.

    Raises:
        ValueError: naming the tensors that leave no room for the sum, or are not finite; or if
            there are no clients, bits or limbs.
    """
    if min(clients, fraction_bits, limbs) < 1:
        raise ValueError(
            "clients, fraction_bits and limbs must be at least 1, got "
            f"{clients}, {fraction_bits} and {limbs}"
        )
    limit = _RING / clients - clients
    faint = _FAINT * 2.0 ** -(limbs * fraction_bits)
    fixed, offenders = {}, []
    for name, tensor in tensors.items():
        rest = tensor.double() * 2.0**fraction_bits
        what, _, layer = name.partition("/")
        if what in ("information", "pull"):
            rest = torch.where(tensors[f"information/{layer}"] < faint, 0.0, rest)
        parts = [rest.round()]
        for _ in range(limbs - 1):
            rest = (rest - parts[-1]) * 2.0**fraction_bits
            parts.append(rest.round())
        stacked = torch.stack(parts)
        if stacked.numel() and not stacked.abs().max() < limit:
            offenders.append(name)
        fixed[name] = stacked.to(torch.int64)
    if offenders:
        raise ValueError(
            f"{', '.join(offenders)} hold numbers too large for {clients} clients and "
            f"{fraction_bits} fraction bits, or not finite: take fewer bits in a word and more "
            "limbs, or a larger sample_unit in client_sums"
        )
    return fixed


def from_fixed(tensors: Mapping[str, Tensor], fraction_bits: int = 40) -> dict[str, Tensor]:
    """Reads a sum of what `to_fixed` wrote.

    Args:
        tensors: of ``int64``, and of shape ``(limbs, *shape)``.
        fraction_bits: as it was written with.

    Returns:
        The numbers, in float64.

    Raises:
        ValueError: naming the tensors of another type, or without limbs.
    """
    if odd := [n for n, t in tensors.items() if t.dtype != torch.int64 or not t.dim()]:
        raise ValueError(f"{', '.join(odd)} are not int64 of shape (limbs, ...), as of to_fixed")
    numbers = {}
    for name, tensor in tensors.items():
        places = -fraction_bits * torch.arange(1, len(tensor) + 1, dtype=torch.float64)
        numbers[name] = torch.tensordot(places.exp2(), tensor.double(), 1)
    return numbers
