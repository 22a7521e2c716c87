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
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_fedfisher.batch_norms import (
    BatchMean,
    BatchStatistics,
    Normalized,
    NoVarianceError,
    RunningStatistics,
    buffer_names,
    read_by,
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
        Their paths. Those that keep their statistics out of the state dict are left out: they are
        not sent.

    Example:
        >>> trained_norms(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2).eval()))
        ('0',)
    """
    norms = [path for path, norm in tracked_norms(model).items() if norm.training]
    sent = model.state_dict().keys() if norms else ()
    return tuple(path for path in norms if all(name in sent for name in buffer_names(path)))


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

    Batches are of samples in a random order, as in training: of one class alone, they vary less.
    Under several processes each normalises by its own batches, as in training too.

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
    """

    def forward(batch: Any) -> Callable[[nn.Module], Tensor]:
        prepared = runner.prepare(model, batch)
        return lambda copied: runner.logits(copied, prepared)

    measured = StatisticsPass(model, layers, norms, forward(samples.preview()))
    assert samples.mixed is not None
    mixed = replace(samples, batches=samples.mixed)
    mixed.run(lambda batch: measured.run(forward(batch)), most, bar, None)
    return measured.finish(shard.total)


class StatisticsPass:
    """Measures running statistics, batch by batch, each layer behind others measured so.

    Example:
        >>> from lightning_fedfisher.layers import find_layers
        >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1)).eval()
        >>> _ = nn.init.constant_(model[0].weight, 3.0)
        >>> batch = torch.tensor([[1.0], [3.0]])
        >>> measured = StatisticsPass(model, find_layers(model), ("1",), lambda m: m(batch))
        >>> measured.run(lambda m: m(batch))
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
        # Of one forward pass: outputs of layers, with their versions, and calls.
        self._outputs: dict[int, tuple[Tensor, int, str]] = {}
        self._calls: Counter[str] = Counter()
        self._means: dict[str, _InputMean] = {}
        self._looks_for_feeds = True
        self._feeds = self._find_feeds(norms, forward)
        self._looks_for_feeds = False
        self._means = {name: self._means[name] for name in dict.fromkeys(self._feeds.values())}
        self._statistics = {p: BatchStatistics(self._model.get_submodule(p)) for p in norms}

    def run(self, forward: Callable[[nn.Module], Tensor]) -> int:
        """Runs a batch. One without variance, as of a single sample, counts for nothing.

        Args:
            forward: Runs a model on the batch.

        Returns:
            The number of samples that count.
        """
        try:
            samples = len(self._forward(forward))
        except NoVarianceError:
            samples = 0
        for mean in (*self._statistics.values(), *self._means.values()):
            mean.add(samples)
        return samples

    def finish(self, total: Callable[[Tensor], Tensor]) -> RunningStatistics:
        """Gives what was found; each process must call this.

        Args:
            total: Adds a tensor up over all processes.

        Returns:
            The running statistics of all batches; nothing if none had two samples.
        """
        like = next(self._model.parameters())
        exact = torch.float32 if like.device.type == "mps" else torch.float64  # which it has not

        for mean in (*self._statistics.values(), *self._means.values()):
            mean.sums = total(mean.sums.to(like.device, exact)).cpu().double()
        buffers: dict[str, Tensor] = {}
        for path, statistics in self._statistics.items():
            if statistics.sums[-1]:
                for name, value in zip(buffer_names(path), statistics.means(), strict=True):
                    buffers[name] = value.to("cpu", self._model.get_buffer(name).dtype)
        means = {
            name: found.value().view(found.groups, -1).to(like.dtype)
            for name, found in self._means.items()
            if found.sums[-1]
        }
        normalized = {
            path: Normalized(name, self._means[name].groups)
            for path, name in self._feeds.items()
            if name in means
        }
        return RunningStatistics(buffers, normalized, means)

    def _forward(self, forward: Callable[[nn.Module], Tensor]) -> Tensor:
        """Runs the copy, and lets go of what it made."""
        self._calls.clear()
        try:
            with torch.enable_grad(), self._recorder:  # which watches nothing without
                return forward(self._model)
        finally:
            self._outputs.clear()
            self._recorder.forget()

    def _find_feeds(
        self, norms: Sequence[str], forward: Callable[[nn.Module], Tensor]
    ) -> dict[str, str]:
        """Finds the layer whose outputs a norm reads, for norms and layers that are called once."""
        read: dict[str, list[str]] = {path: [] for path in norms}

        def note(path: str, norm: nn.Module, args: Any, kwargs: Any) -> None:
            values = read_by(args, kwargs)
            output, version, name = self._outputs.get(id(values), (None, 0, ""))
            read[path].append(name if output is values and version == values._version else "")

        hooks = [
            self._model.get_submodule(path).register_forward_pre_hook(
                partial(note, path), with_kwargs=True
            )
            for path in norms
        ]
        self._forward(forward)
        for hook in hooks:
            hook.remove()
        return {
            path: names[0]
            for path, names in read.items()
            if len(names) == 1 and self._calls[names[0]] == 1  # of "", nobody's, there is no call
        }

    def _on_layer_call(self, call: WatchedCall) -> Any:
        """Makes a call, and takes the mean of what it reads if a norm may follow."""
        output, inputs = call.run(), call.arguments.inputs.detach()
        self._calls.update(call.layer_names)
        if len(call.layers) > 1 or not isinstance(output, Tensor):
            return output
        ((layer, layer_type),) = call.layers
        groups = _groups(layer_type, inputs.ndim)
        if groups is None:
            return output
        if self._looks_for_feeds:
            self._means[layer.name] = _InputMean(groups, self._columns[layer.name])
            self._outputs[id(output)] = output, output._version, layer.name
        elif layer.name in self._means:
            self._means[layer.name].note_call(layer_type, inputs, output)
        return output


class _InputMean(BatchMean):
    """The mean of what the columns of a layer read.

    Attributes:
        groups: Groups of outputs that read inputs of their own.
    """

    def __init__(self, groups: int, columns: int) -> None:
        super().__init__(groups * columns)
        self.groups = groups

    def note_call(self, layer_type: LayerType, inputs: Tensor, output: Tensor) -> None:
        """Takes a call: the gradient of its mean output with respect to the layer's matrix.

        Args:
            layer_type: What the call computes.
            inputs: What it reads, samples first.
            output: What it returns, with features in the second dimension.
        """
        # Gradients add up over samples, whose mean is read at once; and all outputs of a group read
        # the same.
        exact = torch.promote_types(inputs.dtype, torch.float32)
        mean = inputs.to(exact).mean(dim=0, keepdim=True)
        ones = mean.new_ones(1, 1, self.groups, *output.shape[2:])
        (found,) = layer_type.per_sample_gradients(mean, ones, samples=1)
        self.note(found.cpu().double() / math.prod(output.shape[2:]))


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
