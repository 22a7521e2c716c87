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
from lightning_fedfisher.curvature.input_gram import InputGram
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
        InputGram,
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

INPUT_KINDS: dict[str, str] = {
    Kronecker.kind: InputGram.kind,
    ConvolutionKronecker.kind: ConvolutionKronecker.kind,
    EmbeddingKronecker.kind: EmbeddingKronecker.kind,
}
"""The kind that a layer gets with ``"input_gram"``, by the kind that it gets with ``"kfac"``.

All others get the identity. The two kinds that stay hold the identity on the side that is not that
of the inputs: the rows of a large convolution, and the columns of an embedding. It is small beside
what the layer has on its other side, and packs to nothing.

Example:
    >>> INPUT_KINDS["kronecker"], INPUT_KINDS.get("transposed_kronecker", "identity")
    ('input_gram', 'identity')
"""

CurvatureType = Literal["identity", "diagonal", "input_gram", "kfac", "ekfac", "dense"]
"""What an extraction can be asked for."""

KINDS_OF: dict[str, tuple[str, ...]] = {
    "identity": (Identity.kind,),
    "diagonal": (Diagonal.kind,),
    "input_gram": (*INPUT_KINDS.values(), Identity.kind),
    "kfac": (*_FACTORED, ConvolutionKronecker.kind, Diagonal.kind),
    "ekfac": (*EIGEN_CORRECTED.values(), Diagonal.kind),
    "dense": (Dense.kind,),
}
"""The kinds of block that layers may get, by the curvature that an extraction is asked for.

Example:
    >>> KINDS_OF["diagonal"]
    ('diagonal',)
"""
