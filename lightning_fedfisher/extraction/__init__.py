"""A trained model and its samples become curvature, without a Trainer.

Start at `extract_curvature`.
May import: curvature, likelihoods, batch_norms, layers, distributed, errors, _utils and
`update.header`.
"""

from lightning_fedfisher.distributed.processes import Shard
from lightning_fedfisher.extraction.extract import extract_curvature, extract_curvatures
from lightning_fedfisher.extraction.fisher_types import FISHER_TYPES
from lightning_fedfisher.extraction.layer_report import CURVATURE_TYPES, LayerReport
from lightning_fedfisher.extraction.options import ExtractionOptions
from lightning_fedfisher.extraction.result import ExtractedCurvature
from lightning_fedfisher.extraction.sampling import partition_samples
from lightning_fedfisher.layers import Layer, find_layers

__all__ = [
    "CURVATURE_TYPES",
    "FISHER_TYPES",
    "ExtractedCurvature",
    "ExtractionOptions",
    "Layer",
    "LayerReport",
    "Shard",
    "extract_curvature",
    "extract_curvatures",
    "find_layers",
    "partition_samples",
]
