"""Every kind of curvature, by the name under which an update file records it."""

from __future__ import annotations

from lightning_fedfisher.curvature.base import Curvature, Dense, Diagonal, Identity
from lightning_fedfisher.curvature.embedding import LookupEigenKronecker, LookupKronecker
from lightning_fedfisher.curvature.kronecker import EigenKronecker, Kronecker

KINDS: dict[str, type[Curvature]] = {
    cls.kind: cls
    for cls in (
        Identity,
        Diagonal,
        Kronecker,
        LookupKronecker,
        EigenKronecker,
        LookupEigenKronecker,
        Dense,
    )
}
"""Every kind by the name under which an update file records it."""
