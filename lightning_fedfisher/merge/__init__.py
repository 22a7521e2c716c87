"""Client updates become one model, without a Trainer: start at `merge_updates`.

May import: update, curvature, likelihoods, batch_norms, layers, distributed, errors, _utils.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_fedfisher._utils.lazy_import import lazy_exports

if TYPE_CHECKING:
    from lightning_fedfisher.merge.compatibility import CheckedUpdate, check_model, check_updates
    from lightning_fedfisher.merge.merger import Merger
    from lightning_fedfisher.merge.methods import METHODS, MergeMethod
    from lightning_fedfisher.merge.objective import Quadratic
    from lightning_fedfisher.merge.options import MergeOptions
    from lightning_fedfisher.merge.outliers import describe_outliers, outliers_as_sent
    from lightning_fedfisher.merge.result import ClientContribution, LayerResult, MergeResult
    from lightning_fedfisher.merge.solvers import (
        ClosedForm,
        ConjugateGradient,
        PublishedServer,
        Solver,
    )
    from lightning_fedfisher.merge.without_trainer import merge_updates

__all__ = [
    "METHODS",
    "CheckedUpdate",
    "ClientContribution",
    "ClosedForm",
    "ConjugateGradient",
    "LayerResult",
    "MergeMethod",
    "MergeOptions",
    "MergeResult",
    "Merger",
    "PublishedServer",
    "Quadratic",
    "Solver",
    "check_model",
    "check_updates",
    "describe_outliers",
    "merge_updates",
    "outliers_as_sent",
]

# On demand, so that each name brings no more than it needs.
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "METHODS": f"{__name__}.methods",
        "CheckedUpdate": f"{__name__}.compatibility",
        "ClientContribution": f"{__name__}.result",
        "ClosedForm": f"{__name__}.solvers",
        "ConjugateGradient": f"{__name__}.solvers",
        "LayerResult": f"{__name__}.result",
        "MergeMethod": f"{__name__}.methods",
        "MergeOptions": f"{__name__}.options",
        "MergeResult": f"{__name__}.result",
        "Merger": f"{__name__}.merger",
        "PublishedServer": f"{__name__}.solvers",
        "Quadratic": f"{__name__}.objective",
        "Solver": f"{__name__}.solvers",
        "check_model": f"{__name__}.compatibility",
        "check_updates": f"{__name__}.compatibility",
        "describe_outliers": f"{__name__}.outliers",
        "merge_updates": f"{__name__}.without_trainer",
        "outliers_as_sent": f"{__name__}.outliers",
    },
)
