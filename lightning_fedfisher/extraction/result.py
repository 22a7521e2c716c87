"""What an extraction gives: a block of curvature for each layer, and how it came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from lightning_fedfisher.batch_norms import RunningStatistics
from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.curvature.registry import CurvatureType
from lightning_fedfisher.extraction.layer_report import (
    LayerReport,
    format_layer_reports,
)
from lightning_fedfisher.extraction.options import ExtractionOptions
from lightning_fedfisher.extraction.tracing.model_trace import ModelTrace
from lightning_fedfisher.layers import Layer, Source
from lightning_fedfisher.likelihoods.registry import LIKELIHOODS
from lightning_fedfisher.update.header import LeastSquaresFit, UpdateHeader


@dataclass(frozen=True)
class ExtractedCurvature:
    """The curvature of the loss around a trained model.

    Attributes:
        options: Options that it was extracted with.
        layers: Layers of the model, which cover each trained parameter exactly once.
        blocks: Curvature of each layer, by layer name.
        layer_reports: For each layer, in the same order, how its curvature came about and why.
        num_samples: Number of samples the curvature is averaged over, over all processes.
        population: Number of samples the client holds; None if the loader cannot tell.
        seconds: Wall-clock time of the extraction.
        discarded: Share of the Fisher's trace, in the space of the logits, that was left out.
        fed_by: For each layer that reads the outputs of one other layer, that layer, by name.
        output_layer: Name of the layer whose outputs are the logits; empty if there is none.
        trace: What a forward pass of a few samples showed about the model; None if none was run.
        fitted: The model that the curvature is around, if it is not the one that was given.
        fit: What is known of its weights if they are a least-squares fit of the labels
            (`extract_closed_form_head`); None if not.
        statistics: The model's running statistics, where they were measured anew; the curvature is
            that of a model which has them.

    Example:
        >>> import torch
        >>> from lightning_fedfisher.extraction import extract_curvature
        >>> batch = torch.eye(2), torch.tensor([0, 1])
        >>> found = extract_curvature(torch.nn.Sequential(torch.nn.Linear(2, 3)), [batch], "kfac")
        >>> found.parameter_names, found.output_layer
        (('0.weight', '0.bias'), '0')
        >>> found.header(num_samples=2).curvature
        'kfac'
    """

    options: ExtractionOptions
    layers: tuple[Layer, ...]
    blocks: Mapping[str, Curvature]
    layer_reports: tuple[LayerReport, ...]
    num_samples: int
    population: int | None
    seconds: float
    discarded: float = 0.0
    fed_by: Mapping[str, Source] = field(default_factory=dict)
    output_layer: str = ""
    trace: ModelTrace | None = field(default=None, repr=False, compare=False)
    fitted: nn.Module | None = field(default=None, repr=False, compare=False)
    fit: LeastSquaresFit | None = None
    statistics: RunningStatistics = field(default_factory=RunningStatistics)

    @property
    def kind(self) -> CurvatureType:
        """Kind of curvature that was asked for."""
        return self.options.curvature

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the parameters covered, in the order of the layers."""
        return tuple(name for layer in self.layers for name in layer.parameter_names)

    @property
    def report(self) -> str:
        """A few lines on the kind of block that each layer got and why, and on the output layer."""
        output_layer = (
            f"output layer: {self.output_layer}"
            if self.output_layer
            else "no output layer: the logits are no layer's outputs"
        )
        return f"{format_layer_reports(self.layer_reports)}\n{output_layer}"

    def header(
        self, num_samples: int | None = None, metadata: Mapping[str, str] | None = None
    ) -> UpdateHeader:
        """Describes an update that sends this curvature.

        Args:
            num_samples: Number of training samples the client holds; None takes `population`.
            metadata: Further text to send along; None sends none.

        Returns:
            The header, for `ClientUpdate.from_model`.
        """
        options = self.options
        return UpdateHeader(
            num_samples=num_samples or self.population or 0,
            curvature=options.curvature,
            fisher="" if options.curvature in ("identity", "input_gram") else options.fisher,
            likelihood=options.likelihood,
            curvature_samples=self.num_samples,
            layers=self.layers,
            kinds={name: block.kind for name, block in self.blocks.items()},
            metadata=dict(metadata or {}),
            fed_by=self.fed_by,
            output_layer=self.output_layer if LIKELIHOODS[options.likelihood].softmax else "",
            fit=self.fit,
            normalized=self.statistics.normalized,
        )
