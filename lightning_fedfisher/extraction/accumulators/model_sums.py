"""The sums of one extraction: all layers of a model, for all curvatures asked for at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fedfisher.curvature.base import Curvature, Identity
from lightning_fedfisher.curvature.kronecker import Eigenbased, Factored
from lightning_fedfisher.curvature.registry import EIGEN_CORRECTED, KINDS, CurvatureType
from lightning_fedfisher.extraction.accumulators.base import Accumulator, GradientAccumulator
from lightning_fedfisher.extraction.accumulators.convolution import ConvolutionAccumulator
from lightning_fedfisher.extraction.accumulators.dense import DenseAccumulator
from lightning_fedfisher.extraction.accumulators.diagonal import DiagonalAccumulator
from lightning_fedfisher.extraction.accumulators.embedding import EmbeddingAccumulator
from lightning_fedfisher.extraction.accumulators.kronecker import KroneckerAccumulator
from lightning_fedfisher.extraction.accumulators.per_sample_gradients import materialized_gradients
from lightning_fedfisher.extraction.accumulators.spectrum import SpectrumAccumulator
from lightning_fedfisher.extraction.backends.layer_inputs import LayerInputs
from lightning_fedfisher.extraction.backends.output_gradients import OutputGradients
from lightning_fedfisher.extraction.backends.per_sample import PerSampleGradients
from lightning_fedfisher.extraction.layer_report import LayerReport, block_kind, too_large
from lightning_fedfisher.extraction.layer_types.base import are_alike
from lightning_fedfisher.extraction.positions import Positions, shifted
from lightning_fedfisher.extraction.tracing.model_trace import ModelTrace
from lightning_fedfisher.extraction.tracing.recorder import LayerCall, LayerCallRecorder
from lightning_fedfisher.layers import Layer

ACCUMULATORS: Mapping[str, type[Accumulator]] = {
    "diagonal": DiagonalAccumulator,
    "dense": DenseAccumulator,
    "input_gram": KroneckerAccumulator,
    "kronecker": KroneckerAccumulator,
    "transposed_kronecker": KroneckerAccumulator,
    "convolution_kronecker": ConvolutionAccumulator,
    "embedding_kronecker": EmbeddingAccumulator,
}
"""The accumulator of each kind of curvature. EKFAC's are made from those of its factors."""

# Bytes of calls and gradients that are kept for EKFAC, to be used once the eigenbases are known. If
# there are more, the samples are run a second time instead.
_KEPT_BYTES = 2**30
# The kind of the factors in whose eigenbases each eigenvalue-corrected kind is.
_FACTORED = {corrected: factored for factored, corrected in EIGEN_CORRECTED.items()}

# Kinds that take all positions of a sample.
_WHOLE = ("identity", "diagonal", "dense")

Reduce = Callable[[Tensor], Tensor]


class ModelAccumulator:
    """Sums over samples for every layer of a model and one or more kinds of curvature.

    Attributes:
        needs_second_pass: Whether the samples must be run again after `find_eigenbases`.

    Example:
        >>> import torch
        >>> from lightning_fedfisher.extraction.tracing import ModelTracer
        >>> from lightning_fedfisher.layers import find_layers
        >>> model, batch = nn.Linear(2, 2, bias=False), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> layers = find_layers(model)
        >>> tracer = ModelTracer(model, layers)
        >>> with tracer.watch():
        ...     trace = tracer.trace(model(batch))
        >>> sums = ModelAccumulator(model, layers, trace, ["diagonal"], lambda m, batch: m(batch))
        >>> with sums.watch():
        ...     logits = model(batch)
        >>> sums.backward(batch, logits, [torch.ones(2, 2)])
        >>> sums.finish("diagonal", lambda tensor: tensor, count=2)["weight"].diagonal()
        tensor([[0.5000, 2.0000],
                [0.5000, 2.0000]])
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        trace: ModelTrace,
        curvatures: Sequence[CurvatureType],
        logits_of: Callable[[nn.Module, Any], Tensor],
        positions: Positions = None,
    ) -> None:
        """Starts at zero.

        Args:
            model: A copy of the model in eval mode. Its parameters stop requiring gradients.
            layers: All layers of the model.
            trace: What a traced forward pass showed about the model.
            curvatures: Curvatures that will be asked for.
            logits_of: Maps the model and a batch to logits, samples first.
            positions: Most positions of a sample that Kronecker factors are computed from.
        """
        self._layers, self._positions = layers, positions
        self._sampled: set[str] = set()  # layers of which some positions are left out
        self._indices = {layer.name: index for index, layer in enumerate(layers)}
        self._trace = trace
        parameters = dict(model.named_parameters())
        self._accumulators: dict[tuple[str, str], Accumulator] = {}
        for layer in layers:
            for kind in {self._kind(c, layer) for c in curvatures} - {Identity.kind}:
                factored = _FACTORED.get(kind, kind)
                like = parameters[layer.parameter_names[0]].detach()
                self._accumulators.setdefault(
                    (layer.name, factored), ACCUMULATORS[factored](layer, KINDS[factored], like)
                )
        self._finished: dict[tuple[str, str], Curvature] = {}
        self._kept: list[tuple[Layer, Sequence[LayerCall | Tensor], int]] = []
        self._kept_bytes = 0
        # Kind of the factors by layer name, in the order in which all processes reduce them.
        self._corrected = {
            layer.name: _FACTORED[kind]
            for layer in layers
            if "ekfac" in curvatures and (kind := self._kind("ekfac", layer)) in _FACTORED
        }
        self._bases: dict[str, Eigenbased] = {}
        self._spectra: dict[str, SpectrumAccumulator] = {}
        self.needs_second_pass = False
        self._samples, self._uniforms = 0, torch.empty(0)
        collector = LayerInputs if set(curvatures) == {"input_gram"} else OutputGradients
        reached = [layer for layer in layers if layer.name not in trace.unreached]
        known = [layer for layer in reached if layer.name not in trace.varying]
        # The uncalled ones as well, to notice the batch that does use them.
        watched = known + [layer for layer in layers if layer.name in trace.uncalled]
        self._collector = collector(model, watched, trace, self._add)
        others = [
            layer
            for layer in reached
            if layer.name not in trace.layer_types and self._accumulators_of(layer.name)
        ]
        self._per_sample = PerSampleGradients(model, others, logits_of) if others else None

    def watch(self) -> LayerCallRecorder:
        """Forgets the last forward pass, and gives the context manager to run the next one in."""
        return self._collector.watch()

    def backward(
        self,
        batch: Any,
        logits: Tensor,
        directions: Sequence[Tensor],
        uniforms: Tensor | None = None,
    ) -> None:
        """Back-propagates directions and adds up the second moments of their gradients.

        Args:
            batch: The batch that was run, none of whose samples was run before.
            logits: Result of the forward pass inside `watch`.
            directions: Gradients at the logits, each of their shape: all that these samples have.
            uniforms: A random number from 0 to below 1 for each sample, by which its positions are
                chosen; zeros if None.
        """
        self._note(logits, uniforms)
        self._collector.backward(logits, directions)
        if self._per_sample is not None and not self._spectra:
            for direction in directions:
                for gradients in self._per_sample(batch, logits.detach(), direction):
                    for name, gradient in gradients.items():
                        for accumulator in self._accumulators_of(name):
                            assert isinstance(accumulator, GradientAccumulator)
                            accumulator.add_gradients(gradient)

    def add_inputs(self, logits: Tensor, uniforms: Tensor | None = None) -> int:
        """Adds up the second moments of inputs, where nothing else was asked for.

        Args:
            logits: Result of the forward pass inside `watch`.
            uniforms: As for `backward`.

        Returns:
            The number of samples.
        """
        assert isinstance(self._collector, LayerInputs)
        self._note(logits, uniforms)
        self._collector.deliver(logits)
        return self._samples

    def _note(self, logits: Tensor, uniforms: Tensor | None) -> None:
        """Notes how many samples were run, and the numbers that choose their positions."""
        self._samples = len(logits)
        drawn = torch.zeros(len(logits), dtype=torch.float64) if uniforms is None else uniforms
        self._uniforms = drawn.cpu()  # where positions are chosen alike for every device

    def find_eigenbases(self, total: Reduce, first: Reduce, count: int) -> None:
        """Turns the factors of EKFAC into eigenbases, and starts their eigenvalues at zero.

        Args:
            total: Adds a tensor up over all processes.
            first: Gives every process the tensor of rank 0.
            count: Number of samples of all processes together.
        """
        for name, kind in self._corrected.items():
            factors = self._finish(name, kind, total, count)
            assert isinstance(factors, Factored)
            basis = factors.eigendecompose()
            # Eigenbases are not unique, and all processes must use the same.
            same = {field: first(tensor) for field, tensor in basis.tensors().items()}
            self._bases[name] = type(basis).from_tensors(same, basis.shape, basis.kernel)
        self.begin_second_pass()

    def add_kept(self) -> None:
        """Adds what was kept for EKFAC to its eigenvalues, instead of a second pass."""
        while self._kept:
            layer, kept, samples = self._kept.pop()
            spectrum = self._spectra[layer.name]
            gradients = [item for item in kept if isinstance(item, Tensor)]
            for chunk in gradients:
                spectrum.add_gradients(chunk)
            if not gradients:
                spectrum.add([call for call in kept if isinstance(call, LayerCall)], samples)

    def begin_second_pass(self) -> None:
        """Starts EKFAC's eigenvalues at zero; from now on `backward` adds to nothing else."""
        self._spectra = {name: SpectrumAccumulator(basis) for name, basis in self._bases.items()}

    def finish(self, curvature: CurvatureType, total: Reduce, count: int) -> dict[str, Curvature]:
        """Turns the sums into one kind of curvature.

        Args:
            curvature: One of the curvatures asked for.
            total: Adds a tensor up over all processes.
            count: Number of samples of all processes together.

        Returns:
            The block of every layer, by layer name.
        """
        blocks: dict[str, Curvature] = {}
        for layer in self._layers:
            kind = self._kind(curvature, layer)
            if kind == Identity.kind:
                blocks[layer.name] = Identity(layer.shape)
                continue
            if kind in _FACTORED and (layer.name, kind) not in self._finished:
                self._accumulators[layer.name, kind] = self._spectra[layer.name]
            block = self._finish(layer.name, kind, total, count)
            # A convolution's or an embedding's sums may hold its gradients beside its inputs.
            blocks[layer.name] = block.of_inputs() if curvature == "input_gram" else block
        return blocks

    def release(self) -> None:
        """Lets go of all that was found, at once: hooks and sums refer to each other in a cycle."""
        self._accumulators.clear()
        self._finished.clear()
        self._bases.clear()
        self._spectra.clear()
        self._per_sample = None

    def layer_reports(self, curvature: CurvatureType) -> tuple[LayerReport, ...]:
        """Tells how each layer's block of a kind of curvature is computed.

        Args:
            curvature: One of the curvatures asked for.

        Returns:
            One report for each layer, in their order.
        """
        reports = []
        for layer in self._layers:
            kind, backend = self._kind(curvature, layer), "hooks"
            unseen = self._trace.unseen.get(layer.name, "")
            reason = self._trace.unreached.get(layer.name, unseen)
            large = too_large(curvature, self._trace.layer_types.get(layer.name), layer)
            if kind == Identity.kind or layer.name in self._trace.unreached:
                backend = "none"
                reason = reason or large or f"{self._title(layer)} has no input Gram"
            elif reason:
                backend = "torch.func"
            elif kind == "diagonal" and curvature != "diagonal":
                reason = large or f"{self._title(layer)} has no Kronecker factors"
            some = layer.name in self._sampled and kind not in _WHOLE
            reports.append(LayerReport(layer, kind, backend, reason, some))
        return tuple(reports)

    def _finish(self, name: str, kind: str, total: Reduce, count: int) -> Curvature:
        """Turns the sums of a layer into a curvature, once, and lets go of them."""
        if (name, kind) not in self._finished:
            accumulator = self._accumulators.pop((name, kind))
            sums = {part: total(tensor) for part, tensor in accumulator.sums.items()}
            self._finished[name, kind] = accumulator.finish(sums, count)
        return self._finished[name, kind]

    def _title(self, layer: Layer) -> str:
        """Names what a layer computes."""
        types = self._trace.layer_types[layer.name]
        return types[0].title if are_alike(types) else "a parameter of unlike operations"

    def _kind(self, curvature: CurvatureType, layer: Layer) -> str:
        """Gives the kind of a layer's block."""
        return block_kind(curvature, self._trace.layer_types.get(layer.name), layer)

    def _accumulators_of(self, name: str) -> list[Accumulator]:
        """Gives the accumulators of a layer, one for each kind of block it gets."""
        return [a for (owner, _), a in self._accumulators.items() if owner == name]

    def _add(self, layer: Layer, calls: Sequence[LayerCall]) -> None:
        """Adds the calls of a layer, once all their gradients have come back."""
        if self._spectra:
            if layer.name in self._spectra:
                self._spectra[layer.name].add(calls, self._samples)
            return
        accumulators = self._accumulators_of(layer.name)
        keeps = layer.name in self._corrected and not self.needs_second_pass
        wants = keeps or any(isinstance(a, GradientAccumulator) for a in accumulators)
        gradients = materialized_gradients(calls, self._samples, layer.shape) if wants else None
        for accumulator in accumulators:
            if isinstance(accumulator, KroneckerAccumulator):
                accumulator.add(self._at_positions(layer, calls), self._samples)
            elif gradients is None or not isinstance(accumulator, GradientAccumulator):
                accumulator.add(calls, self._samples)
            else:
                for chunk in gradients:
                    accumulator.add_gradients(chunk)
        if keeps:
            self._keep(layer, calls if gradients is None else gradients)

    def _at_positions(self, layer: Layer, calls: Sequence[LayerCall]) -> list[LayerCall]:
        """Takes the positions of each sample that the factors are computed from."""
        uniforms = shifted(self._uniforms, self._indices[layer.name])
        some = [call.at_positions(self._positions, uniforms) for call in calls]
        if any(one is not call for one, call in zip(some, calls, strict=True)):
            self._sampled.add(layer.name)
        return some

    def _keep(self, layer: Layer, items: Sequence[LayerCall] | Sequence[Tensor]) -> None:
        """Keeps calls or gradients for EKFAC, or drops all of them for a second pass."""
        self._kept.append((layer, list(items), self._samples))
        for item in items:
            tensors = (item,) if isinstance(item, Tensor) else (item.inputs, item.gradients)
            self._kept_bytes += sum(t.numel() * t.element_size() for t in tensors)
        if self._kept_bytes > _KEPT_BYTES:
            self._kept.clear()
            self.needs_second_pass = True
