"""A client's running statistics, measured anew, and the means of inputs from which they follow.

Running statistics lag behind the weights: with a momentum of 0.01 they remember a hundred batches,
most of which other weights have seen. And nobody else's weights have them. Behind a layer of
weights ``W`` whose inputs have mean ``m``, the outputs have mean ``W m`` for any ``W``: with ``m``,
and the inputs' second moment that its curvature holds, a server knows what they are in a merged
model (`merge.carried_statistics`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_fedfisher._utils.batches import count_samples
from lightning_fedfisher.batch_norms import (
    FEWEST,
    BatchStatistics,
    Normalized,
    RunningStatistics,
    buffer_names,
    tracked_norms,
)
from lightning_fedfisher.distributed.processes import Shard
from lightning_fedfisher.extraction.batches import BatchRunner
from lightning_fedfisher.extraction.layer_types.base import KroneckerLayer, LayerType
from lightning_fedfisher.extraction.layer_types.convolution import GroupedConvolution
from lightning_fedfisher.extraction.model_copy import frozen_copy
from lightning_fedfisher.extraction.sampling import MaxSamples, SamplePartition
from lightning_fedfisher.extraction.tracing.recorder import LayerCallRecorder, WatchedCall
from lightning_fedfisher.layers import Layer


def trained_norms(model: nn.Module) -> tuple[str, ...]:
    """Finds the BatchNorm layers whose running statistics follow the training: in training mode.

    Args:
        model: The model, in the mode in which it was trained.

    Returns:
        Their paths.

    Example:
        >>> trained_norms(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2).eval()))
        ('0',)
    """
    return tuple(path for path, norm in tracked_norms(model).items() if norm.training)


def measure_statistics(
    model: nn.Module,
    layers: Sequence[Layer],
    norms: Sequence[str],
    runner: BatchRunner,
    samples: SamplePartition,
    shard: Shard,
    most: MaxSamples,
    bar: tqdm[Any],
) -> RunningStatistics:
    """Measures a client's running statistics in one pass over its samples.

    Args:
        model: A copy of the user's model, in eval mode.
        layers: Its layers.
        norms: Paths of the BatchNorm layers to measure.
        runner: Runs the model on a batch.
        samples: The samples of this process.
        shard: The place of this process.
        most: Most samples, where the loader cannot tell how many there are.
        bar: Progress bar, shown or not.

    Returns:
        The running statistics; nothing if no batch has two samples.

    Raises:
        ValueError: If batches of several samples have no variance.
    """

    def forward(batch: Any) -> Callable[[nn.Module], Tensor]:
        return lambda copied: runner.logits(copied, batch)

    preview = runner.prepare(model, samples.preview())
    measured = StatisticsPass(model, layers, norms, forward(preview))

    def add(batch: Any) -> int:
        batch = runner.prepare(model, batch)
        return measured.run(forward(batch), count_samples(batch))

    samples.run(add, most, bar, None)
    return measured.finish(shard.total)


class StatisticsPass:
    """Measures running statistics, batch by batch, each layer behind others measured so.

    Example:
        >>> from lightning_fedfisher.layers import find_layers
        >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1)).eval()
        >>> _ = nn.init.constant_(model[0].weight, 3.0)
        >>> batch = torch.tensor([[1.0], [3.0]])
        >>> measured = StatisticsPass(model, find_layers(model), ("1",), lambda m: m(batch))
        >>> measured.run(lambda m: m(batch), samples=2)
        2
        >>> found = measured.finish(lambda tensor: tensor)
        >>> found.buffers["1.running_mean"], found.input_means["0"]
        (tensor([6.]), tensor([[2.]]))
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        norms: Sequence[str],
        forward: Callable[[nn.Module], Tensor],
    ) -> None:
        """Copies the model, but for its parameters, and finds the layers whose outputs norms read.

        Args:
            model: A copy of the user's model, in eval mode.
            layers: Its layers.
            norms: Paths of the BatchNorm layers to measure.
            forward: Runs a model on a few samples, the same on all processes.
        """
        self._model = frozen_copy(model)
        self._recorder = LayerCallRecorder(self._model, layers, self._on_layer_call)
        self._columns = {layer.name: layer.shape[1] for layer in layers}
        self._statistics: dict[str, BatchStatistics] = {}
        for path in norms:
            norm = self._model.get_submodule(path)
            norm.register_forward_pre_hook(partial(self._on_norm, path))
            self._statistics[path] = BatchStatistics(norm)
        # Of one forward pass: outputs of layers, with their versions, and calls.
        self._outputs: dict[int, tuple[Tensor, int, str]] = {}
        self._calls: Counter[str] = Counter()
        self._read: dict[str, list[str]] = {}  # by each norm
        self._means: dict[str, _InputMean] = {}
        self._weight = 0
        self._forward(forward)
        once = {path: read[0] for path, read in self._read.items() if len(read) == 1}
        # Of a name that is empty there was no call.
        self._feeds = {path: name for path, name in once.items() if self._calls[name] == 1}
        self._means = {name: self._means[name] for name in dict.fromkeys(self._feeds.values())}

    def run(self, forward: Callable[[nn.Module], Tensor], samples: int) -> int:
        """Runs a batch.

        Args:
            forward: Runs a model on the batch.
            samples: What it counts for: about its samples. One alone is not run: it may have no
                variance.

        Returns:
            The number of samples that were run.
        """
        if samples < FEWEST:
            return samples
        self._weight = samples
        return len(self._forward(forward))

    def finish(self, total: Callable[[Tensor], Tensor]) -> RunningStatistics:
        """Gives what was found; each process must call this.

        Args:
            total: Adds a tensor up over all processes.

        Returns:
            The running statistics of all batches; nothing if none had two samples.
        """
        like = next(self._model.parameters())
        exact = torch.float32 if like.device.type == "mps" else torch.float64  # which it has not

        def summed(sums: Tensor) -> Tensor:
            return total(sums.to(like.device, exact)).cpu().double()

        buffers: dict[str, Tensor] = {}
        for path, statistics in self._statistics.items():
            statistics.sums = summed(statistics.sums)
            if statistics.sums[-1]:
                for name, value in zip(buffer_names(path), statistics.means(), strict=True):
                    buffers[name] = value.to("cpu", self._model.get_buffer(name).dtype)
        means: dict[str, Tensor] = {}
        for name, found in self._means.items():
            sums = summed(found.sums)
            if sums[-1]:
                means[name] = (sums[:-1] / sums[-1]).view(found.groups, -1).to(like.dtype)
        normalized = {
            path: Normalized(name, self._means[name].groups)
            for path, name in self._feeds.items()
            if name in means
        }
        return RunningStatistics(buffers, normalized, means)

    def _forward(self, forward: Callable[[nn.Module], Tensor]) -> Tensor:
        """Runs the copy, and lets go of what it made."""
        for statistics in self._statistics.values():
            statistics.weight = self._weight
        self._calls.clear()
        self._read.clear()
        with torch.enable_grad(), self._recorder:  # which watches nothing without
            logits = forward(self._model)
        self._outputs.clear()
        self._recorder.forget()
        return logits

    def _on_layer_call(self, call: WatchedCall) -> Any:
        """Makes a call, and adds up the mean of what it reads if a norm may follow."""
        output, inputs = call.run(), call.arguments.inputs.detach()
        for layer, layer_type in call.layers:
            groups = _groups(layer_type, inputs.ndim)
            if groups is None or len(call.layers) > 1 or not isinstance(output, Tensor):
                continue
            self._calls[layer.name] += 1
            if self._weight == 0:  # nothing is known yet
                self._means[layer.name] = _InputMean(groups, self._columns[layer.name])
                self._outputs[id(output)] = output, output._version, layer.name
            elif layer.name in self._means:
                self._means[layer.name].add(layer_type, inputs, output, self._weight)
        return output

    def _on_norm(self, path: str, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Notes whose outputs a norm reads; nobody's if anything came in between."""
        if self._weight == 0:
            output, version, name = self._outputs.get(id(inputs[0]), (None, 0, ""))
            same = output is inputs[0] and version == inputs[0]._version
            self._read.setdefault(path, []).append(name if same else "")


class _InputMean:
    """The mean of what the columns of a layer read, summed over batches.

    Attributes:
        groups: Groups of outputs that read inputs of their own.
        sums: The means times their weights, one group after the other, and the weights' sum.
    """

    def __init__(self, groups: int, columns: int) -> None:
        self.groups = groups
        self.sums = torch.zeros(groups * columns + 1, dtype=torch.float64)

    def add(self, layer_type: LayerType, inputs: Tensor, output: Tensor, weight: int) -> None:
        """Adds a call: the gradient of its mean output with respect to the layer's matrix.

        Args:
            layer_type: What the call computes.
            inputs: What it reads, samples first.
            output: What it returns, with features in the second dimension.
            weight: Number of samples.
        """
        # Gradients add up over samples, whose mean is read at once; and all outputs of a group read
        # the same.
        exact = torch.promote_types(inputs.dtype, torch.float32)
        mean = inputs.to(exact).mean(dim=0, keepdim=True)
        ones = mean.new_ones(1, 1, self.groups, *output.shape[2:])
        (found,) = layer_type.per_sample_gradients(mean, ones, samples=1)
        positions = math.prod(output.shape[2:])
        self.sums[:-1] += weight / positions * found.flatten().cpu().double()
        self.sums[-1] += weight


def _groups(layer_type: LayerType, ndim: int) -> int | None:
    """Counts groups of outputs that read inputs of their own.

    Args:
        layer_type: What a layer computes.
        ndim: Number of dimensions of its input.

    Returns:
        The number; None if outputs are no rows of the layer's matrix, or not in the second
        dimension, where BatchNorm has its channels.
    """
    if isinstance(layer_type, GroupedConvolution):
        return layer_type.groups
    rows = isinstance(layer_type, KroneckerLayer) and not layer_type.inputs_are_rows
    return 1 if rows and layer_type.channel_axis(ndim) == 1 else None
