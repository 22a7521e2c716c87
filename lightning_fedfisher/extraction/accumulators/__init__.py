"""Sums over samples: the second moments that a layer's curvature is made of.

May import: backends, tracing, layer_types, layer_report, positions, curvature, layers.
"""

from lightning_fedfisher.extraction.accumulators.base import Accumulator, GradientAccumulator
from lightning_fedfisher.extraction.accumulators.model_sums import ACCUMULATORS, ModelAccumulator

__all__ = ["ACCUMULATORS", "Accumulator", "GradientAccumulator", "ModelAccumulator"]
