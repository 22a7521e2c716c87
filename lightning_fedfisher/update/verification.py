"""Whether the tensors of an update are what its header says, each alone and together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import Tensor

from lightning_fedfisher.curvature.registry import KINDS
from lightning_fedfisher.errors import UpdateError
from lightning_fedfisher.update.buffer_roles import buffer_role
from lightning_fedfisher.update.decompression import decode_root, largest_of_root
from lightning_fedfisher.update.header import UpdateHeader
from lightning_fedfisher.update.tensor_checks import find_problem, largest_of

LARGEST_PRODUCT = 1e30
"""Largest value that curvature applied to weights may have: float32 holds many clients' sum."""


def damages(
    header: UpdateHeader,
    tensors: Mapping[str, Tensor],
    decode: bool = True,
    curvature: bool = True,
    definite: bool = True,
) -> list[str]:
    """Reads every tensor once, one at a time, and finds what is wrong with it.

    Args:
        header: What the tensors mean.
        tensors: Tensors by their names in the file. Those of a file are read when asked for.
        decode: Whether to decode what is quantized.
        curvature: Whether to read the curvature as well.
        definite: Whether to make sure that factors are symmetric and positive semi-definite.

    Returns:
        One line for each tensor that cannot be used, and for each layer whose weights and
        curvature are too large together.

    Example:
        >>> import torch
        >>> header = UpdateHeader(1, "identity", "", "categorical", 0, layers=(), kinds={})
        >>> damages(header, {"buffers/mask": torch.tensor([math.nan])})
        ['buffers/mask holds 1 values that are not finite']
    """
    roles, offenders, largest = header.tensor_roles(), list[str](), dict[str, float]()
    for name in (n for n in tensors if curvature or n.split("/")[0] != "curvature"):
        shape, role = roles.get(name, ((), buffer_role(name)))
        try:
            tensor = tensors[name]
            if (packed := header.quantized.get(name)) is None:
                # A root is definite; so what is packed needs no such check.
                if found := find_problem(tensor, role, definite):
                    offenders.append(f"{name} {found}")
                elif name in roles:
                    largest[name] = largest_of(tensor)
            elif decode and role is not None:
                numbers = decode_root(tensor, packed, shape, role)
                largest[name] = largest_of_root(numbers, packed, role)
                if role == "basis":
                    found = find_problem(numbers.view(shape) * packed.step, role)
                    offenders += [f"{name} {found}"] if found else []
        except UpdateError as error:
            offenders += error.offenders
        except (ValueError, RuntimeError, MemoryError) as error:
            offenders.append(f"{name} cannot be unpacked: {error}")
    return [*offenders, *_too_large_together(header, largest)]


def _too_large_together(header: UpdateHeader, largest: Mapping[str, float]) -> Iterable[str]:
    """Names the layers whose curvature, applied to their weights, float32 might not hold."""
    for layer in header.layers:
        kind, prefix = KINDS[header.kinds[layer.name]], f"curvature/{layer.name}/"
        weights = max(largest.get(f"parameters/{name}", 0.0) for name in layer.parameter_names)
        parts = [part for part, role in kind.tensor_roles.items() if role != "basis"]
        curvature = math.prod(largest.get(prefix + part, 0.0) for part in parts)
        if weights * curvature * math.prod(layer.shape) > LARGEST_PRODUCT:
            yield (
                f"layer {layer.name}: weights up to {weights:.1e} and curvature up to "
                f"{curvature:.1e} are too large for float32 together"
            )
