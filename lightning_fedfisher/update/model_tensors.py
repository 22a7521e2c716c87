"""What of a trained model goes into an update, and under which names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor, nn

from lightning_fedfisher._utils.unwrapping import unwrapped
from lightning_fedfisher.batch_norms import RunningStatistics
from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.layers import aliases
from lightning_fedfisher.update.frozen import frozen_digests
from lightning_fedfisher.update.header import UpdateHeader


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
