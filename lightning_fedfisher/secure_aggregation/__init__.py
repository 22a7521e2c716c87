"""A merge from sums over clients, so that nobody sees a single update.

May import: merge, update, curvature, layers, errors.
"""

from lightning_fedfisher.secure_aggregation.fixed_point import from_fixed, to_fixed
from lightning_fedfisher.secure_aggregation.head_sums import head_from_sums, head_sums
from lightning_fedfisher.secure_aggregation.sums import client_sums, divisors, update_from_sums

__all__ = [
    "client_sums",
    "divisors",
    "from_fixed",
    "head_from_sums",
    "head_sums",
    "to_fixed",
    "update_from_sums",
]
