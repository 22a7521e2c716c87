"""All charts of a report, in their order; add a chart here."""

from __future__ import annotations

from lightning_fedfisher.report.charts.clients import curvature_chart, data_chart, loss_chart
from lightning_fedfisher.report.charts.merges import convergence_chart, weight_chart
from lightning_fedfisher.report.charts.scores import (
    accuracy_chart,
    accuracy_finding,
    confusion_chart,
)
from lightning_fedfisher.report.charts.style import Chart, Panel
from lightning_fedfisher.results.record import FederationRecord

__all__ = ["Chart", "Panel", "accuracy_finding", "charts"]

_CHARTS = (
    data_chart,
    loss_chart,
    accuracy_chart,
    curvature_chart,
    convergence_chart,
    weight_chart,
    confusion_chart,
)


def charts(record: FederationRecord) -> list[Chart]:
    """Draws every chart for which a record has data.

    Args:
        record: The record of the federation.

    Returns:
        At most seven charts, each with a title that says what it shows.
    """
    return [chart for draw in _CHARTS if (chart := draw(record))]
