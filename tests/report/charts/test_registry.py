"""Every record can be drawn, whatever is missing from it or odd about it."""

import json
import math
from dataclasses import replace

import pytest
from helpers.charts import with_first_merge
from helpers.records import HOSTILE, federation, hostile, large, long_names

from lightning_fedfisher.curvature.summary import CurvatureSummary
from lightning_fedfisher.report.charts.registry import charts
from lightning_fedfisher.results.record import (
    ClientRecord,
    FederationRecord,
)

NAMES = ["data", "loss", "accuracy", "curvature", "convergence", "clients", "confusion"]


def _bare():
    return FederationRecord("", [], [])


def _untested():
    record = federation()
    merges = [replace(own, score=None, history=own.history[:1]) for own in record.merges]
    return replace(record, merges=merges, best_client=None, ensemble=None)


def _extreme():
    record = federation(clients=9)
    curved = [
        CurvatureSummary("a", 10.0 ** (60 * k - 250), math.inf, [1e300, 1.0]) for k in range(9)
    ]
    curved[0] = CurvatureSummary("a", -1.0, math.nan, [0.0, 0.0])
    clients = [
        replace(own, curvature=[layer], train_loss=[1e30])
        for own, layer in zip(record.clients, curved, strict=True)
    ]
    values = [[10.0 ** (60 * k - 250) for k in range(9)], [math.nan] * 8 + [math.inf]]
    return with_first_merge(replace(record, clients=clients), distances=values, influence=values)


EVERY = {
    "usual": federation,
    "one client": lambda: federation(clients=1),
    "one method": lambda: replace(federation(), merges=federation().merges[:1]),
    "a thousand clients": lambda: federation(clients=1000),
    "large": large,
    "hostile": hostile,
    "long names": long_names,
    "one name for all": lambda: federation(names=["same"] * 12),
    "bare": _bare,
    "untested": _untested,
    "extreme": _extreme,
    "nobody trained": lambda: replace(federation(), clients=[ClientRecord("a", 0)] * 5),
    "one class": lambda: federation(classes=1),
    "sixty methods": lambda: replace(federation(), merges=federation().merges * 20),
}


@pytest.mark.parametrize("name", EVERY)
def test_every_record_can_be_drawn(name):
    found = charts(EVERY[name]())
    assert [chart.name for chart in found] == [n for n in NAMES if n in {c.name for c in found}]
    for chart in found:
        assert chart.title.strip()
        assert chart.subtitle.endswith(".")
        for text in (chart.title, chart.subtitle):
            assert not {"nan", "inf", "None"} & set(text.replace(".", " ").split())
            assert len(text) < 320
        assert 1 <= len(chart.panels) <= 2
        for panel in chart.panels:
            drawn = panel.figure.to_plotly_json()
            json.dumps(drawn, allow_nan=False)
            assert panel.figure.layout.height <= 640
            assert panel.figure.layout.title.text is None
            assert any(
                len(trace.x if trace.x is not None else trace.z) for trace in panel.figure.data
            )


def test_a_usual_record_has_every_chart():
    assert [chart.name for chart in charts(federation())] == NAMES


def test_a_bare_record_has_none():
    assert charts(_bare()) == []


def test_plotly_gets_no_tags():
    for chart in charts(hostile()):
        for panel in chart.panels:
            for text in (*HOSTILE[:3],):
                assert text not in panel.figure.to_json()
                assert text not in str(panel.figure.to_plotly_json())


def test_a_missing_extra_is_named(monkeypatch):
    import importlib
    import sys

    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    for name in [n for n in sys.modules if n.startswith("lightning_fedfisher.report")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"pip install 'lightning-fedfisher\[report\]'"):
        importlib.import_module("lightning_fedfisher.report.charts.registry")
