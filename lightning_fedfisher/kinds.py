"""Every kind of curvature, by the name under which an update file records it."""

from __future__ import annotations

from lightning_fedfisher.curvature import Curvature, Dense, Diagonal, Identity
from lightning_fedfisher.kronecker import EigenKronecker, Kronecker
from lightning_fedfisher.lookup import LookupEigenKronecker, LookupKronecker

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
