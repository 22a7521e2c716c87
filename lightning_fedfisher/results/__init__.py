"""What a federation did, in plain numbers: the records that reports and dashboards read.

May import: merge, update, curvature, _utils, errors.
"""

from __future__ import annotations

from lightning_fedfisher.results.record import (
    ClientRecord,
    FederationRecord,
    MergeRecord,
    ModelScore,
)

__all__ = ["ClientRecord", "FederationRecord", "MergeRecord", "ModelScore"]
