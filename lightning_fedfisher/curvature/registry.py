"""Every kind of curvature, by the name under which an update file records it.

To add a kind, write a subclass of `Curvature` and add it to `KINDS`. A kind that an extraction
gives also needs a row of `extraction.accumulators.model_sums.ACCUMULATORS`.
"""

from __future__ import annotations

from typing import Literal

from lightning_fedfisher.curvature.base import Curvature, Identity
from lightning_fedfisher.curvature.convolution import ConvolutionKronecker
from lightning_fedfisher.curvature.dense import Dense
from lightning_fedfisher.curvature.diagonal import Diagonal
from lightning_fedfisher.curvature.embedding import EmbeddingEigenKronecker, EmbeddingKronecker
from lightning_fedfisher.curvature.kronecker import (
    Eigenbased,
    EigenKronecker,
    Factored,
    Kronecker,
    TransposedEigenKronecker,
    TransposedKronecker,
)

KINDS: dict[str, type[Curvature]] = {
    cls.kind: cls
    for cls in (
        Identity,
        Diagonal,
        Kronecker,
        TransposedKronecker,
        ConvolutionKronecker,
        EmbeddingKronecker,
        EigenKronecker,
        TransposedEigenKronecker,
        EmbeddingEigenKronecker,
        Dense,
    )
}
"""Every kind of curvature, by the name under which an update file records it.

Example:
    >>> KINDS["ekfac"].__name__
    'EigenKronecker'
"""

EIGEN_CORRECTED: dict[str, str] = {
    cls.factored.kind: name for name, cls in KINDS.items() if issubclass(cls, Eigenbased)
}
"""The kind that a layer gets with ``"ekfac"``, by the kind that it gets with ``"kfac"``.

Example:
    >>> EIGEN_CORRECTED["kronecker"]
    'ekfac'
"""

_FACTORED = tuple(name for name, cls in KINDS.items() if issubclass(cls, Factored))

CurvatureType = Literal["identity", "diagonal", "kfac", "ekfac", "dense"]
"""What an extraction can be asked for."""

KINDS_OF: dict[str, tuple[str, ...]] = {
    "identity": (Identity.kind,),
    "diagonal": (Diagonal.kind,),
    "kfac": (*_FACTORED, ConvolutionKronecker.kind, Diagonal.kind),
    "ekfac": (*EIGEN_CORRECTED.values(), Diagonal.kind),
    "dense": (Dense.kind,),
}
"""The kinds of block that layers may get, by the curvature that an extraction is asked for.

Example:
    >>> KINDS_OF["diagonal"]
    ('diagonal',)
"""
