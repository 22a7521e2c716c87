"""The curvature of one layer: each kind of Fisher information as a linear operator on its weights.

A kind multiplies, inverts, averages and describes itself (`Curvature`); `KINDS` lists all of them.
May import: nothing of this package.
"""

from lightning_fedfisher.curvature.base import Curvature, Identity
from lightning_fedfisher.curvature.convolution import ConvolutionKronecker
from lightning_fedfisher.curvature.dense import Dense
from lightning_fedfisher.curvature.diagonal import Diagonal
from lightning_fedfisher.curvature.embedding import EmbeddingEigenKronecker, EmbeddingKronecker
from lightning_fedfisher.curvature.input_gram import InputGram
from lightning_fedfisher.curvature.input_map import InputMap
from lightning_fedfisher.curvature.kronecker import (
    EigenKronecker,
    Kronecker,
    TransposedEigenKronecker,
    TransposedKronecker,
)
from lightning_fedfisher.curvature.linalg import PseudoInverse
from lightning_fedfisher.curvature.registry import EIGEN_CORRECTED, INPUT_KINDS, KINDS, KINDS_OF
from lightning_fedfisher.curvature.summary import CurvatureSummary, summarize_curvature

__all__ = [
    "EIGEN_CORRECTED",
    "INPUT_KINDS",
    "KINDS",
    "KINDS_OF",
    "ConvolutionKronecker",
    "Curvature",
    "CurvatureSummary",
    "Dense",
    "Diagonal",
    "EigenKronecker",
    "EmbeddingEigenKronecker",
    "EmbeddingKronecker",
    "Identity",
    "InputGram",
    "InputMap",
    "Kronecker",
    "PseudoInverse",
    "TransposedEigenKronecker",
    "TransposedKronecker",
    "summarize_curvature",
]
