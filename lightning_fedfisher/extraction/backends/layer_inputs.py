"""Collects the inputs of a layer's calls, for curvature of the inputs alone: no backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.extraction.backends.output_gradients import CallPlace, OutputGradients
from lightning_fedfisher.extraction.layer_types.base import LayerType
from lightning_fedfisher.extraction.tracing.batch_axis import BatchAxis
from lightning_fedfisher.layers import Layer


class LayerInputs(OutputGradients):
    """Gives the calls of each layer once a forward pass is over, with gradients that are zero.

    Nothing of the forward pass is in an autograd graph. The inputs of all calls are held until it
    is over, because only its logits tell how many samples there are.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_fedfisher.extraction.tracing import ModelTracer
        >>> from lightning_fedfisher.layers import find_layers
        >>> model, batch = nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> layers = find_layers(model)
        >>> tracer = ModelTracer(model, layers)
        >>> with tracer.watch():
        ...     trace = tracer.trace(model(batch))
        >>> collector = LayerInputs(model, layers, trace, lambda layer, calls: print(calls))
        >>> with collector.watch():
        ...     logits = model(batch)
        >>> collector.deliver(logits)
        [LayerCall(layer_type=Linear(has_bias=True), inputs=tensor([[1., 2.],
                [3., 4.]]), gradients=tensor([[[0.],
                 [0.]]]))]
    """

    _differentiates: ClassVar[bool] = False

    def deliver(self, logits: Tensor) -> None:
        """Gives the calls of the forward pass that was just watched.

        Args:
            logits: Its result, samples first.

        Raises:
            ValueError: If the forward pass did not call the same layers as the traced one.
        """
        self._require_same_calls()
        self._samples, self._directions = len(logits), 1
        for place, batch_axis, inputs, layers, zeros in self._noted:
            self._arrive(place, batch_axis, inputs, layers, zeros)
        self._forget()

    @override
    def _forget(self) -> None:
        super()._forget()
        self._noted: list[
            tuple[CallPlace, BatchAxis, Tensor, Sequence[tuple[Layer, LayerType]], Tensor]
        ] = []

    @override
    def _follow(
        self,
        place: CallPlace,
        batch_axis: BatchAxis,
        inputs: Tensor,
        layers: Sequence[tuple[Layer, LayerType]],
        output: Tensor,
    ) -> Tensor:
        # Of the gradient only the shape matters: one zero is all of it in memory.
        zeros = output.new_zeros(()).expand(output.shape)
        self._noted.append((place, batch_axis, inputs, layers, zeros))
        return output
