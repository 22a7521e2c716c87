"""What the charts of clients say and draw, against numbers that were found in another way."""

import math

import pytest
from helpers.charts import (
    chart_of,
    clients_holding,
    clients_losing,
    record_of,
    title_of,
)
from helpers.records import federation

from lightning_fedfisher.curvature.summary import CurvatureSummary
from lightning_fedfisher.results.record import ClientRecord


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ([(6, 0, 0), (1, 2, 1)], "client-0 holds 60% of the samples and 1 of 3 classes"),
        ([(5, 0), (0, 5)], "All 2 clients hold 5 samples and 1 of 2 classes each"),
        ([(4, 1), (0, 5)], "All 2 clients hold 5 samples each, client-1 of 1 of 2 classes only"),
        ([(3, 0, 2)], "client-0 holds all samples, and 2 of 3 classes"),
        ([(1, 1)] * 999 + [(2, 1)], "client-999 holds 0.1% of the samples and 2 of 2 classes"),
        ([(10**6,), (1,)], "client-0 holds more than 99.9% of the samples and 1 of 1 class"),
    ],
)
def test_data_says_who_holds_what(counts, said):
    assert title_of(record_of(clients_holding(*counts)), "data") == said


def test_data_counts_only_clients_that_tell():
    clients = [
        *clients_holding((3, 1), (0, 4)),
        ClientRecord("silent", 1000),
        ClientRecord("none", 0, [0]),
    ]
    chart = chart_of(record_of(clients), "data")
    assert "of the samples that are told by class" in chart.title
    assert "2 clients that tell no classes left out" in chart.subtitle
    assert "50%" in chart.title


def test_data_adds_up_what_it_draws():
    record = federation(clients=7, classes=12)
    drawn = [[0] * 12 for _ in range(7)]
    for trace in chart_of(record, "data").panels[0].figure.data:
        for row, values in zip(drawn, trace.z, strict=True):
            for at, value in enumerate(values):
                row[at] += value or 0
    assert drawn == [client.class_counts for client in record.clients]


def test_data_shows_the_largest_of_many_and_groups_classes():
    counts = [[1 + index] * 250 for index in range(1000)]
    chart = chart_of(record_of(clients_holding(*counts)), "data")
    assert "20 largest of 1,000 clients" in chart.subtitle
    assert "groups of 3" in chart.subtitle
    (trace,) = chart.panels[0].figure.data
    assert len(trace.z) == 20
    assert sum(map(sum, trace.z)) == sum(250 * amount for amount in range(981, 1001))


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (
            [(2, 0.5), (2, 0.25)],
            "Training loss fell at all 2 clients and ended between 0.25 and 0.5",
        ),
        (
            [(2, 0.5), (1, 1.5)],
            "Training loss fell at 1 of 2 clients and ended between 0.5 and 1.5",
        ),
        ([(2, 1), (3, 1)], "Training loss fell at all 2 clients and ended at 1"),
        ([(1, 1), (1, 1)], "Training loss fell at 0 of 2 clients and ended at 1"),
        ([(2,), (1,)], "After one epoch the training loss of 2 clients is between 1 and 2"),
        ([(2, 3)], "The training loss of client-0 rose from 2 to 3"),
        ([(2,)], "The training loss of client-0 ends at 2"),
        ([(2, math.nan), (2, 1)], "Training loss is not finite in the end at client-0"),
        ([(2, math.inf)] * 3 + [(1,)], "Training loss is not finite in the end at 3 of 4 clients"),
        ([(0.0, 0.0)], "The training loss of client-0 went from 0 to 0"),
    ],
)
def test_loss_says_how_training_ended(losses, said):
    assert title_of(record_of(clients_losing(*losses)), "loss") == said


def test_curvature_says_which_layer_has_most():
    layers = [[("a", 1.0, 3.0), ("b", 2.0, 40.0)], [("a", 0.0, 5.0), ("b", 5.0, 20.0)]]
    clients = [
        ClientRecord(str(index), 1, curvature=[CurvatureSummary(*layer) for layer in own])
        for index, own in enumerate(layers)
    ]
    chart = chart_of(record_of(clients), "curvature")
    assert chart.title == "b has 88% of the curvature, spread over about 30 directions"
    assert "1 trace not positive and finite left out" in chart.subtitle
    assert len(chart.panels) == 1


def test_spectrum_is_of_the_layer_with_most():
    record = federation()
    traces = {
        layer: sum(own.trace for c in record.clients for own in c.curvature if own.layer == layer)
        for layer in ("first", "second")
    }
    most = max(traces, key=traces.get)
    _, panel = chart_of(record, "curvature").panels
    assert panel.heading == f"Spectrum of {most}"
    assert list(panel.figure.data[0].y)[:3] == pytest.approx([1, 0.6, 0.36])
