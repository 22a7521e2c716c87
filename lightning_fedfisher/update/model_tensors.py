"""What of a trained model goes into an update, and under which names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_fedfisher._utils.unwrapping import unwrapped
from lightning_fedfisher.batch_norms import RunningStatistics
from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.errors import UpdateError
from lightning_fedfisher.layers import aliases
from lightning_fedfisher.update.frozen import frozen_digests
from lightning_fedfisher.update.header import UpdateHeader
from lightning_fedfisher.update.safetensors_layout import DTYPES


def collect_tensors(
    model: nn.Module,
    header: UpdateHeader,
    blocks: Mapping[str, Curvature],
    statistics: RunningStatistics | None = None,
) -> tuple[UpdateHeader, dict[str, Tensor]]:
    """Collects all tensors that an update of a model holds.

    Args:
        model: Model that the curvature belongs to.
        header: Header to send; what it says of shared and frozen parameters is replaced.
        blocks: Curvature of each layer, by layer name.
        statistics: Running statistics in place of the model's, where they were measured anew;
            None for none.

    Returns:
        The header with the model's shared and frozen parameters, and the tensors on the CPU by
        their names in the file: copies of trained parameters and persistent buffers, which the
        model may change, and the curvature, which never changes.

    Raises:
        UpdateError: If a tensor has a type that no update holds, or another name in the model's
            state dict; all are named.
    """
    model = unwrapped(model)
    frozen = frozen_digests(model)
    persistent, measured = model.state_dict(), statistics or RunningStatistics()
    shared = {
        name: first
        for name, first in aliases(model).items()
        if first not in frozen and first in persistent
    }
    named: dict[str, Tensor] = {
        f"parameters/{name}": tensor
        for name, tensor in model.named_parameters()
        if name not in frozen
    }
    if offenders := _unsendable(model, named, persistent):
        raise UpdateError("the update of this model", offenders)
    for name, tensor in model.named_buffers():
        if name in persistent:
            # In the type of the model, whose copy may have been more exact.
            named[f"buffers/{name}"] = measured.buffers.get(name, tensor).to(tensor.dtype)
    for name, mean in measured.input_means.items():
        named[f"input_means/{name}"] = mean
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in named.items()
    }
    for name, block in blocks.items():
        for part, tensor in block.tensors().items():
            tensors[f"curvature/{name}/{part}"] = tensor.detach().cpu().contiguous()
    return dataclasses.replace(header, aliases=shared, frozen=frozen), tensors


def _unsendable(
    model: nn.Module, parameters: Mapping[str, Tensor], persistent: Mapping[str, object]
) -> list[str]:
    """One line for each tensor that cannot be sent, or that a server could not load again."""
    otherwise = (
        "has another name in state_dict(), or none, so that what is merged could not be loaded: "
        "leave state_dict() as it is, or"
    )
    names = [name.partition("/")[2] for name in parameters]
    offenders = [f"{n} {otherwise} freeze it" for n in names if n not in persistent]
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None or name in module._non_persistent_buffers_set:
                continue
            full = f"{path}.{name}" if path else name
            remedy = "register it with persistent=False and make it in __init__"
            if full not in persistent:
                offenders.append(f"{full} {otherwise} {remedy}")
            elif buffer.layout != torch.strided or buffer.dtype not in DTYPES.values():
                kind = str(buffer.dtype if buffer.layout == torch.strided else buffer.layout)
                kind = kind.removeprefix("torch.")
                offenders.append(f"{full} is {kind}, which no update holds: {remedy}")
    return offenders
