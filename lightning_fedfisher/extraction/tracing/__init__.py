"""One watched forward pass: which calls use which layers, and whose outputs each layer reads.

May import: layer_types, positions, layers, errors.
"""

from lightning_fedfisher.extraction.tracing.batch_axis import BatchAxis, possible_batch_axes
from lightning_fedfisher.extraction.tracing.dataflow import Dataflow
from lightning_fedfisher.extraction.tracing.model_trace import ModelTrace, ModelTracer
from lightning_fedfisher.extraction.tracing.recorder import LayerCall, LayerCallRecorder

__all__ = [
    "BatchAxis",
    "Dataflow",
    "LayerCall",
    "LayerCallRecorder",
    "ModelTrace",
    "ModelTracer",
    "possible_batch_axes",
]
