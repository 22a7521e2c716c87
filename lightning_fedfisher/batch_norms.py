"""BatchNorm's running statistics: which layers keep some, and what they are on given samples.

BatchNorm normalises by the mean and variance that its inputs had in training, which it remembers as
running statistics. They are buffers, not parameters: no curvature says what to make of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_fedfisher.layers import BATCH_NORMS

FEWEST = 2
"""Samples of a batch that has statistics: one alone may have no variance."""


@dataclass(frozen=True)
class Normalized:
    """The layer whose outputs a BatchNorm normalises, with nothing in between.

    Attributes:
        layer: Name of the layer.
        groups: Number of groups of outputs that read inputs of their own, as in a grouped
            convolution; 1 if all outputs read the same.

    Example:
        >>> Normalized("conv1")
        Normalized(layer='conv1', groups=1)
    """

    layer: str
    groups: int = 1


@dataclass(frozen=True)
class RunningStatistics:
    """Running statistics that were measured, and the means from which they follow.

    Attributes:
        buffers: Running means and variances, by buffer name.
        normalized: The layer whose outputs a BatchNorm normalises, by the path of the BatchNorm.
        input_means: By layer name, what its columns read, as a mean over samples and positions: of
            shape ``(groups, columns)``, with 1 in the column of a bias. The mean of an output is
            its row of weights times the row of its group.

    Example:
        >>> RunningStatistics().buffers
        {}
    """

    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    normalized: Mapping[str, Normalized] = field(default_factory=dict)
    input_means: Mapping[str, Tensor] = field(default_factory=dict)


def tracked_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Finds the BatchNorm layers that keep running statistics.

    Args:
        model: Any module.

    Returns:
        The layers by their paths.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.LayerNorm(2))
        >>> list(tracked_norms(model))
        ['1']
    """
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, BATCH_NORMS) and module.running_mean is not None
    }


def buffer_names(path: str) -> tuple[str, str]:
    """Names the running mean and variance of a BatchNorm.

    Args:
        path: Path of the BatchNorm; empty for the model itself.

    Example:
        >>> buffer_names("bn1")
        ('bn1.running_mean', 'bn1.running_var')
    """
    return f"{path}.running_mean".lstrip("."), f"{path}.running_var".lstrip(".")


class BatchStatistics:
    """Has a BatchNorm normalise by its batches, and adds up their means and variances.

    The layers behind it then see what they saw in training. The layer itself stays in eval mode: it
    is given each batch's statistics as its own.

    Attributes:
        weight: What the next batch counts for: its number of samples. Of 0, nothing is done.

    Example:
        >>> norm = nn.BatchNorm1d(1, affine=False).eval()
        >>> statistics = BatchStatistics(norm)
        >>> statistics.weight = 2
        >>> norm(torch.tensor([[1.0], [3.0]])).flatten().round(decimals=3)
        tensor([-1.,  1.])
        >>> mean, variance = statistics.means()
        >>> float(mean), float(variance)
        (2.0, 2.0)
    """

    def __init__(self, norm: nn.Module) -> None:
        """Watches a layer.

        Args:
            norm: The layer, in eval mode and of a copy of the model: its buffers change.
        """
        norm.register_forward_pre_hook(self._add)
        self.weight = 0
        self._size = norm.get_buffer("running_mean").numel()
        self.sums = torch.zeros(2 * self._size + 1, dtype=torch.float64)

    @torch.no_grad()
    def _add(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Adds a call's statistics, on the CPU and in float64, in which no sum of many stalls."""
        if not self.weight:
            return
        values = inputs[0].detach().to(torch.promote_types(inputs[0].dtype, torch.float32))
        count = values.numel() // self._size
        if count < FEWEST:
            raise ValueError(
                "a batch has one value for each channel of a BatchNorm, and so no variance: "
                "use larger batches"
            )
        variance, mean = torch.var_mean(
            values, dim=[d for d in range(values.ndim) if d != 1], correction=1
        )
        norm.get_buffer("running_mean").copy_(mean)
        norm.get_buffer("running_var").copy_(variance * ((count - 1) / count))
        found = torch.cat([mean.cpu().double(), variance.cpu().double()])
        self.sums[:-1] += self.weight * found
        self.sums[-1] += self.weight

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance over all calls, in float64; not a number if there was none."""
        both = self.sums[:-1] / self.sums[-1]
        return both[: self._size], both[self._size :]
