"""One chart of a record, and records that a chart is drawn of."""

from __future__ import annotations

from dataclasses import replace

from helpers.records import history, merge

from lightning_fedfisher.report.charts.registry import charts
from lightning_fedfisher.results.record import ClientRecord, FederationRecord


def chart_of(record, name):
    (found,) = [chart for chart in charts(record) if chart.name == name]
    return found


def title_of(record, name):
    return chart_of(record, name).title


def record_of(clients=(), merges=(), **rest):
    return FederationRecord("A test", list(clients), list(merges), **rest)


def clients_holding(*counts):
    return [
        ClientRecord(f"client-{index}", sum(own), list(own)) for index, own in enumerate(counts)
    ]


def clients_losing(*losses):
    return [
        ClientRecord(f"client-{index}", 9, train_loss=list(own)) for index, own in enumerate(losses)
    ]


def with_first_merge(record, **changes):
    return replace(record, merges=[replace(record.merges[0], **changes), *record.merges[1:]])


def merges_reaching(*accuracies, **rest):
    methods = zip(("one", "two", "three"), accuracies, strict=False)
    return record_of(merges=[merge(name, accuracy) for name, accuracy in methods], **rest)


def merges_ending(**residuals):
    merges = [
        replace(merge(name), history=[*history(), {"iterations": 300.0, "residual": residual}])
        for name, residual in residuals.items()
    ]
    return record_of(merges=merges)
