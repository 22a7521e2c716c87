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
    prefix = f"{path}." if path else ""
    return f"{prefix}running_mean", f"{prefix}running_var"


class NoVarianceError(ValueError):
    """A BatchNorm was given one value for each channel."""


class BatchMean:
    """The mean of what calls give, over batches that count for their samples.

    Attributes:
        sums: Sums over batches of what calls gave, times the batch's weight, and of the weights.

    Example:
        >>> found = BatchMean(size=1)
        >>> for number, weight in ((1.0, 3), (5.0, 1)):
        ...     found.note(torch.tensor([number]))
        ...     found.add(weight)
        >>> found.value()
        tensor([2.], dtype=torch.float64)
    """

    def __init__(self, size: int) -> None:
        """Starts at zero.

        Args:
            size: Entries of what a call gives.
        """
        self.sums = torch.zeros(size + 1, dtype=torch.float64)
        self._batch = torch.zeros_like(self.sums)

    def note(self, values: Tensor) -> None:
        """Takes what a call gives, on the CPU and in float64, in which no sum of many stalls.

        Args:
            values: A tensor of `size` entries.
        """
        self._batch[:-1] += values.flatten().cpu().double()
        self._batch[-1] += 1

    def add(self, weight: int) -> None:
        """Adds the batch that was run.

        Args:
            weight: What it counts for: its number of samples. Of 0, it is forgotten.
        """
        self.sums += weight * self._batch
        self._batch.zero_()

    def value(self) -> Tensor:
        """The mean over all calls, in float64; not a number if there was none."""
        return self.sums[:-1] / self.sums[-1]


class BatchStatistics(BatchMean):
    """Has a BatchNorm normalise by its batches, and adds up their means and variances.

    The layers behind it then see what they saw in training. The layer itself stays in eval mode: it
    is given each batch's statistics as its own.

    Example:
        >>> norm = nn.BatchNorm1d(1, affine=False).eval()
        >>> statistics = BatchStatistics(norm)
        >>> norm(torch.tensor([[1.0], [3.0]])).flatten().round(decimals=3)
        tensor([-1.,  1.])
        >>> statistics.add(weight=2)
        >>> mean, variance = statistics.means()
        >>> float(mean), float(variance)
        (2.0, 2.0)
    """

    def __init__(self, norm: nn.Module) -> None:
        """Watches a layer.

        Args:
            norm: The layer, in eval mode and of a copy of the model: its buffers change.
        """
        self._channels = norm.get_buffer("running_mean").numel()
        super().__init__(2 * self._channels)
        norm.register_forward_pre_hook(self._on_call, with_kwargs=True)

    @torch.no_grad()
    def _on_call(
        self, norm: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> None:
        """Gives the layer the statistics of what it is called with, and takes note of them."""
        read = read_by(args, kwargs).detach()
        values = read.to(torch.promote_types(read.dtype, torch.float32))
        count = values.numel() // self._channels
        if count <= 1:
            raise NoVarianceError(
                "a batch has one value for each channel of a BatchNorm, and so no variance: "
                "use larger batches"
            )
        channels_apart = [d for d in range(values.ndim) if d != 1]
        variance, mean = torch.var_mean(values, dim=channels_apart, correction=1)
        norm.get_buffer("running_mean").copy_(mean)
        norm.get_buffer("running_var").copy_(variance * ((count - 1) / count))
        self.note(torch.cat([mean, variance]))

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance over all calls, in float64; not a number if there was none."""
        both = self.value()
        return both[: self._channels], both[self._channels :]


def read_by(args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> Tensor:
    """Finds what a BatchNorm is called with.

    Args:
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Example:
        >>> read_by((), {"input": torch.ones(1)})
        tensor([1.])
    """
    return args[0] if args else kwargs["input"]
