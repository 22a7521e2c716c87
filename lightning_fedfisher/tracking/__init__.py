"""What is logged to W&B and to Lightning's other loggers, under which names, and its dashboards.

May import: results, update, curvature, merge, distributed, _utils.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_fedfisher._utils.lazy_import import lazy_exports

if TYPE_CHECKING:
    from lightning_fedfisher.tracking.federation import log_federation
    from lightning_fedfisher.tracking.server import log_merged_model
    from lightning_fedfisher.tracking.wandb_logger import federation_logger

__all__ = ["federation_logger", "log_federation", "log_merged_model"]

# On demand, so that the names of `logged_keys` come without Lightning.
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "federation_logger": f"{__name__}.wandb_logger",
        "log_federation": f"{__name__}.federation",
        "log_merged_model": f"{__name__}.server",
    },
)
