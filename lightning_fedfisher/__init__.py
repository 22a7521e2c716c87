"""One-shot federated learning for PyTorch Lightning.

Clients train alone, once, with `FedFisherCallback` on their Trainer, and send one `ClientUpdate`
file. A server merges the files with `merge_updates`, or with `FisherMergeModule` on its Trainer,
into the one model that minimises the sum of the clients' quadratics.

A name is imported when it is first used, so that a client does not pay for the server, nor anybody
for what they do not touch. Everything else is imported from its folder, as
``from lightning_fedfisher.curvature import Kronecker``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_fedfisher._utils.environment import package_version
from lightning_fedfisher._utils.lazy_import import lazy_exports

if TYPE_CHECKING:
    from lightning_fedfisher.callback import FedFisherCallback
    from lightning_fedfisher.closed_form_head import fit_closed_form_head
    from lightning_fedfisher.errors import (
        BudgetError,
        FedFisherError,
        MergeError,
        UnsupportedModelError,
        UpdateError,
    )
    from lightning_fedfisher.extraction.extract import extract_curvature
    from lightning_fedfisher.layer_features import LayerFeatures
    from lightning_fedfisher.losses import PriorCrossEntropy
    from lightning_fedfisher.merge.methods import METHODS, MergeMethod
    from lightning_fedfisher.merge.without_trainer import merge_updates
    from lightning_fedfisher.merge_module import FisherMergeModule
    from lightning_fedfisher.plan import plan_update
    from lightning_fedfisher.random_features import RandomFeatures
    from lightning_fedfisher.report import write_report
    from lightning_fedfisher.tracking.wandb_logger import federation_logger
    from lightning_fedfisher.update.client_update import ClientUpdate

__all__ = [
    "METHODS",
    "BudgetError",
    "ClientUpdate",
    "FedFisherCallback",
    "FedFisherError",
    "FisherMergeModule",
    "LayerFeatures",
    "MergeError",
    "MergeMethod",
    "PriorCrossEntropy",
    "RandomFeatures",
    "UnsupportedModelError",
    "UpdateError",
    "__version__",
    "extract_curvature",
    "federation_logger",
    "fit_closed_form_head",
    "merge_updates",
    "plan_update",
    "write_report",
]

_ROOMS = {
    "callback": ("FedFisherCallback",),
    "closed_form_head": ("fit_closed_form_head",),
    "errors": (
        *("FedFisherError", "UnsupportedModelError", "UpdateError", "MergeError", "BudgetError"),
    ),
    "extraction.extract": ("extract_curvature",),
    "layer_features": ("LayerFeatures",),
    "losses": ("PriorCrossEntropy",),
    "merge.methods": ("METHODS", "MergeMethod"),
    "merge.without_trainer": ("merge_updates",),
    "merge_module": ("FisherMergeModule",),
    "plan": ("plan_update",),
    "random_features": ("RandomFeatures",),
    "report": ("write_report",),
    "tracking.wandb_logger": ("federation_logger",),
    "update.client_update": ("ClientUpdate",),
}

__version__ = package_version()
__getattr__, __dir__ = lazy_exports(
    __name__, {name: f"{__name__}.{room}" for room, names in _ROOMS.items() for name in names}
)
