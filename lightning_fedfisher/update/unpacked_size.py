"""How much memory a file may take when it is unpacked: no more than its size allows for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from lightning_fedfisher.update.header import UpdateHeader
from lightning_fedfisher.update.safetensors_layout import Spec, spec_bytes

# What a file may unpack to: a matrix of any narrow layer, and a multiple of its bytes that allows
# for the columns of a layer of one row, 4096 of them at a budget of 1.
_UNPACKED_ANYWAY, _UNPACKED_TIMES = 2**25, 2**12
_FLOAT_BYTES = 4  # of a number, whatever it is packed as


def excesses(
    header: UpdateHeader, specs: Mapping[str, Spec], file_bytes: int, max_tensor_bytes: int
) -> list[str]:
    """Finds what takes too much memory.

    Args:
        header: Header of the update.
        specs: Shape and type of each tensor, unpacked, by its name in the file.
        file_bytes: Size of the file.
        max_tensor_bytes: Most bytes of memory that one tensor may take.

    Returns:
        One line for each tensor that is too large, and one if all of them are.
    """
    offenders = [
        f"{name} takes {spec_bytes(spec)} bytes, more than max_tensor_bytes={max_tensor_bytes}"
        for name, spec in specs.items()
        if spec_bytes(spec) > max_tensor_bytes
    ]
    excess = unpacked_excess(header, header.quantized, file_bytes)
    return [*offenders, excess] if excess else offenders


def unpacked_excess(header: UpdateHeader, names: Iterable[str], file_bytes: int) -> str:
    """Finds out whether what is packed in a file takes memory out of all proportion to it.

    A root of one row is as many numbers as its matrix has rows, so that a few bytes could stand for
    gigabytes.

    Args:
        header: Header of the update.
        names: Names of the tensors that are packed.
        file_bytes: Size of the file.

    Returns:
        The reason to refuse it; empty if there is none.
    """
    roles = header.tensor_roles()
    unpacked = _FLOAT_BYTES * sum(math.prod(roles[name][0]) for name in names)
    most = _UNPACKED_ANYWAY + _UNPACKED_TIMES * file_bytes
    if unpacked <= most:
        return ""
    return f"it unpacks to {unpacked} bytes, and a file of {file_bytes} may to {most}"
