"""The types of layer whose weights are understood: how a call of each becomes gradients.

To add one, write one file and add a row to `READERS` (see `registry`). May import: errors.
"""

from lightning_fedfisher.extraction.layer_types.base import (
    FunctionCall,
    KroneckerLayer,
    LayerType,
    SparseLayer,
)
from lightning_fedfisher.extraction.layer_types.registry import OPENED, READERS, read_call

__all__ = [
    "OPENED",
    "READERS",
    "FunctionCall",
    "KroneckerLayer",
    "LayerType",
    "SparseLayer",
    "read_call",
]
