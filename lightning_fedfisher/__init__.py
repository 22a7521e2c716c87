"""One-shot federated learning for PyTorch Lightning.

Clients train alone, once, with `FedFisherCallback` on their Trainer, and send one `ClientUpdate`
file. A server runs `FisherMergeModule` on its Trainer and gets the one model that minimises the sum
of the clients' quadratics.
"""

# Client
from lightning_fedfisher.callback import FedFisherCallback
from lightning_fedfisher.extraction.extract import extract_curvature, extract_curvatures
from lightning_fedfisher.extraction.options import ExtractionOptions
from lightning_fedfisher.extraction.result import ExtractedCurvature

# Server
from lightning_fedfisher.errors import MergeError
from lightning_fedfisher.merge_module import FisherMergeModule
from lightning_fedfisher.merge.methods import METHODS

# Secure aggregation
from lightning_fedfisher.secure_aggregation.sums import update_from_sums, client_sums
from lightning_fedfisher.secure_aggregation.fixed_point import from_fixed, to_fixed

# What is told of it
from lightning_fedfisher.results.record import (
    ClientRecord,
    FederationRecord,
    LayerCurvature,
    MergeRecord,
    ModelScore,
)
from lightning_fedfisher.tracking.wandb_run import (
    federation_logger,
    log_federation,
    log_merged_model,
)

# What crosses between them, and what it is made of
from lightning_fedfisher.errors import BudgetError
from lightning_fedfisher.curvature.base import Curvature, Identity
from lightning_fedfisher.curvature.dense import Dense
from lightning_fedfisher.curvature.diagonal import Diagonal
from lightning_fedfisher.curvature.registry import KINDS
from lightning_fedfisher.curvature.kronecker import EigenKronecker, Kronecker
from lightning_fedfisher.curvature.embedding import EmbeddingEigenKronecker, EmbeddingKronecker
from lightning_fedfisher.layers import Layer, find_layers
from lightning_fedfisher.errors import UnsupportedModelError
from lightning_fedfisher.update.client_update import ClientUpdate
from lightning_fedfisher.update.header import UpdateHeader
from lightning_fedfisher.errors import UpdateError

__all__ = [
    "KINDS",
    "METHODS",
    "BudgetError",
    "ClientRecord",
    "ClientUpdate",
    "Curvature",
    "Dense",
    "Diagonal",
    "EigenKronecker",
    "EmbeddingEigenKronecker",
    "EmbeddingKronecker",
    "ExtractedCurvature",
    "ExtractionOptions",
    "FedFisherCallback",
    "FederationRecord",
    "FisherMergeModule",
    "Identity",
    "Kronecker",
    "Layer",
    "LayerCurvature",
    "MergeError",
    "MergeRecord",
    "ModelScore",
    "UnsupportedModelError",
    "UpdateError",
    "UpdateHeader",
    "client_sums",
    "extract_curvature",
    "extract_curvatures",
    "federation_logger",
    "find_layers",
    "from_fixed",
    "log_federation",
    "log_merged_model",
    "to_fixed",
    "update_from_sums",
]
__version__ = "0.1.0"
