"""The sums of one extraction: what a pass over the samples adds up, for all kinds asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.curvature.kronecker import Eigenbased, Factored
from lightning_fedfisher.curvature.registry import EIGENBASED, KINDS
from lightning_fedfisher.extraction.accumulators.kronecker import (
    Accumulator,
    DenseAccumulator,
    DiagonalAccumulator,
    EmbeddingAccumulator,
    GradientAccumulator,
    KroneckerAccumulator,
    SpectrumAccumulator,
    written,
)
from lightning_fedfisher.extraction.backends.output_gradients import GradientCollector
from lightning_fedfisher.extraction.backends.per_sample import FunctionalGradients
from lightning_fedfisher.extraction.layer_report import CurvatureType, LayerReport, kind_of
from lightning_fedfisher.extraction.tracing.model_trace import ModelTrace
from lightning_fedfisher.extraction.tracing.recorder import LayerCall
from lightning_fedfisher.layers import Layer

# Uses kept for the eigenvalue correction before it takes a second pass instead.
_KEPT_BYTES = 2**30
_ACCUMULATORS: dict[str, type[Accumulator]] = {
    "kronecker": KroneckerAccumulator,
    "transposed_kronecker": KroneckerAccumulator,
    "embedding_kronecker": EmbeddingAccumulator,
    "diagonal": DiagonalAccumulator,
    "dense": DenseAccumulator,
}
# The factors whose eigenbases an eigenvalue-corrected kind stands in.
_FACTORS = {corrected: factored for factored, corrected in EIGENBASED.items()}

Total = Callable[[Tensor], Tensor]


class ModelAccumulator:
    """Sums of second moments over samples, for one or more kinds of curvature at once.

    Attributes:
        needs_second_pass: whether the samples must be run again, after `turn`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        survey: ModelTrace,
        curvatures: Sequence[CurvatureType],
        logits_of: Callable[[nn.Module, Any], Tensor],
    ) -> None:
        """Starts at zero.

        Args:
            model: a throw-away copy in eval mode.
            layers: of the model.
            survey: of the model.
            curvatures: kinds asked for.
            logits_of: maps the model and a batch to logits.
        """
        self._layers = layers
        self._survey = survey
        parameters = dict(model.named_parameters())
        self._moments: dict[tuple[str, str], Accumulator] = {}
        for layer in layers:
            for kind in {self._kind(c, layer) for c in curvatures}:
                base = _FACTORS.get(kind, kind)
                like = parameters[layer.parameter_names[0]].detach()
                self._moments.setdefault(
                    (layer.name, base), _ACCUMULATORS[base](layer, KINDS[base], like)
                )
        self._kept: list[tuple[Layer, Sequence[LayerCall | Tensor], int]] = []
        self._kept_bytes = 0
        # By layer name, the kind of the factors; in the order in which all processes reduce them.
        self._corrected = {
            layer.name: _FACTORS[kind]
            for layer in layers
            if "ekfac" in curvatures and (kind := self._kind("ekfac", layer)) in _FACTORS
        }
        self._bases: dict[str, Eigenbased] = {}
        self._spectra: dict[str, SpectrumAccumulator] = {}
        self.needs_second_pass = False
        self._samples = 0
        self.collector = GradientCollector(model, layers, survey, self._add)
        others = [layer for layer in layers if layer.name not in survey.operations]
        self._functional = FunctionalGradients(model, others, logits_of) if others else None

    def treatments(self, curvature: CurvatureType) -> tuple[LayerReport, ...]:
        """How each layer is treated for a kind of curvature."""
        found = []
        for layer in self._layers:
            kind, way = self._kind(curvature, layer), "hooks"
            reason = self._survey.unseen.get(layer.name, "")
            if reason:
                way = "torch.func"
            elif kind == "diagonal" and curvature != "diagonal":
                title = self._survey.operations[layer.name][0].title
                reason = f"{title} has no Kronecker factors"
            found.append(LayerReport(layer, kind, way, reason))
        return tuple(found)

    def backward(self, batch: Any, logits: Tensor, directions: Sequence[Tensor]) -> None:
        """Back-propagates directions and adds their second moments.

        Args:
            batch: that was run, all of its samples for the first time.
            logits: of the forward pass that `collector` just watched.
            directions: of the logits' shape: all that these samples have.
        """
        self._samples = len(logits)
        self.collector.backward(logits, directions)
        if self._functional is not None and not self._spectra:
            for direction in directions:
                for gradients in self._functional(batch, logits.detach(), direction):
                    for name, gradient in gradients.items():
                        for moments in self._of(name):
                            assert isinstance(moments, GradientAccumulator)
                            moments.add_gradients(gradient)

    def _of(self, name: str) -> list[Accumulator]:
        return [moments for (owner, _), moments in self._moments.items() if owner == name]

    def _add(self, layer: Layer, uses: Sequence[LayerCall]) -> None:
        if self._spectra:
            if layer.name in self._spectra:
                self._spectra[layer.name].add(uses, self._samples)
            return
        owned = self._of(layer.name)
        keeps = layer.name in self._corrected and not self.needs_second_pass
        wants = keeps or any(isinstance(moments, GradientAccumulator) for moments in owned)
        gradients = written(uses, self._samples, layer.shape) if wants else None
        for moments in owned:
            if gradients is None or not isinstance(moments, GradientAccumulator):
                moments.add(uses, self._samples)
            else:
                for part in gradients:
                    moments.add_gradients(part)
        if keeps:
            self._keep(layer, uses if gradients is None else gradients)

    def _keep(self, layer: Layer, what: Sequence[LayerCall] | Sequence[Tensor]) -> None:
        """Keeps uses or gradients for the eigenvalue correction, or gives up all of them."""
        self._kept.append((layer, list(what), self._samples))
        for item in what:
            tensors = (item,) if isinstance(item, Tensor) else (item.inputs, item.gradient)
            self._kept_bytes += sum(t.numel() * t.element_size() for t in tensors)
        if self._kept_bytes > _KEPT_BYTES:
            self._kept.clear()
            self.needs_second_pass = True

    def turn(self, total: Total, first: Total, count: int) -> None:
        """Turns the factors into eigenbases, and starts their spectra at zero.

        Args:
            total: adds a tensor up over all processes.
            first: the first process's tensor, on every process.
            count: samples over all processes.
        """
        for name, kind in self._corrected.items():
            factors = _finished(self._moments[name, kind], total, count)
            assert isinstance(factors, Factored)
            basis = factors.eigen()
            # Bases are not unique: all processes must stand in the same.
            same = {part: first(tensor) for part, tensor in basis.tensors().items()}
            self._bases[name] = type(basis).from_tensors(same, basis.shape)
        self.begin_second_pass()

    def correct_kept(self) -> None:
        """Adds the spectra of what was kept."""
        while self._kept:
            layer, what, samples = self._kept.pop()
            spectrum = self._spectra[layer.name]
            gradients = [item for item in what if isinstance(item, Tensor)]
            for part in gradients:
                spectrum.add_gradients(part)
            if not gradients:
                spectrum.add([u for u in what if isinstance(u, LayerCall)], samples)

    def begin_second_pass(self) -> None:
        """Starts the spectra at zero: what is back-propagated from now on is added to them."""
        self._spectra = {name: SpectrumAccumulator(basis) for name, basis in self._bases.items()}

    def finish(self, curvature: CurvatureType, total: Total, count: int) -> dict[str, Curvature]:
        """The curvature of every layer.

        Args:
            curvature: one of the kinds asked for.
            total: adds a tensor up over all processes.
            count: samples over all processes.
        """
        blocks: dict[str, Curvature] = {}
        for layer in self._layers:
            kind = self._kind(curvature, layer)
            corrected = kind in _FACTORS
            moments = self._spectra[layer.name] if corrected else self._moments[layer.name, kind]
            blocks[layer.name] = _finished(moments, total, count)
        return blocks

    def _kind(self, curvature: CurvatureType, layer: Layer) -> str:
        return kind_of(curvature, self._survey.operations.get(layer.name))


def _finished(moments: Accumulator, total: Total, count: int) -> Curvature:
    """The curvature from all processes; of copies, because a reduction may work in place."""
    return moments.finish({name: total(t.clone()) for name, t in moments.sums.items()}, count)
