"""What the charts of scores say and draw, against numbers that were found in another way."""

import math
from dataclasses import replace

import pytest
from helpers.charts import (
    chart_of,
    merges_reaching,
    record_of,
    title_of,
)
from helpers.records import federation, merge, score

from lightning_fedfisher.results.record import ModelScore


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (
            merges_reaching(71, best_client=score(66)),
            "one reaches 71.0%, 5.0 points above the best sing",
        ),
        (
            merges_reaching(60, best_client=score(61)),
            "one reaches 60.0%, 1 point below the best single",
        ),
        (
            merges_reaching(60, best_client=score(60.01)),
            "one reaches 60.0%, level with the best single",
        ),
        (
            merges_reaching(60, ensemble=score(50)),
            "one reaches 60.0%, 10.0 points above the ensemble of",
        ),
        (merges_reaching(60, 80, best_client=score(50)), "best single client; two reaches 80.0%"),
        (merges_reaching(60, 50), "one reaches 60.0%"),
        (merges_reaching(60, 60), "one reaches 60.0%"),
        (merges_reaching(0, best_client=score(0)), "one reaches 0.0%, level with"),
        (merges_reaching(math.nan, 50), "two reaches 50.0%"),
    ],
)
def test_accuracy_says_what_the_first_method_reached(record, said):
    assert said in title_of(record, "accuracy")


def test_accuracy_marks_methods_that_used_labels():
    record = federation()
    bars = {bar.name: bar for bar in chart_of(record, "accuracy").panels[0].figure.data}
    (used,) = [bar for name, bar in bars.items() if name.startswith("used labelled")]
    assert list(used.x) == [70.0]
    assert used.marker.pattern.shape == "/"
    (free,) = [bar for bar in bars.values() if bar is not used]
    assert list(free.x) == [71.0, 40.0]
    assert used.marker.color != free.marker.color


def test_accuracy_labels_its_lines_one_above_the_other():
    figure = chart_of(federation(), "accuracy").panels[0].figure
    assert [note.text for note in figure.layout.annotations] == [
        "best single client 66.0",
        "ensemble of all clients 69.0",
    ]
    low, high = (note.yshift for note in figure.layout.annotations)
    assert high - low >= 16


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (
            [[1, 9], [0, 10]],
            [[8, 2], [5, 5]],
            "more often than the best single client in 1 of 2 classes; in class 0 in 80% of cases, "
            "not 10%",
        ),
        (
            [[5, 5], [0, 10]],
            [[4, 6], [5, 5]],
            "less often than the best single client in 2 of 2 classes; in class 1 in 50% of cases, "
            "not 100%",
        ),
        ([[5, 5], [0, 1]], [[5, 5], [0, 2]], "right as often as the best single client in every"),
        ([[1, 1], [0, 0]], [[2, 0], [0, 0]], "in 1 of 1 classes; in class 0 in 100% of cases"),
        ([], [[8, 2], [3, 7]], "one takes 30% of class 1 for class 0"),
        ([], [[8, 0], [0, 7]], "one makes no mistake"),
        ([[8, 2], [3, 7]], [], "The best single client takes 30% of class 1 for class 0"),
        ([[8, 2], [3, 7]], [[1, 2, 3]] * 3, "The best single client takes 30% of class 1"),
    ],
)
def test_confusion_says_what_got_better(before, after, said):
    merged = replace(merge("one"), score=ModelScore(50, 1, 1, after))
    record = record_of(merges=[merged], best_client=ModelScore(50, 1, 1, before))
    chart = chart_of(record, "confusion")
    assert said in chart.title
    assert len(chart.panels) == bool(before) + bool(after)


def test_confusion_rows_add_up_to_a_hundred():
    for panel in chart_of(federation(classes=250), "confusion").panels:
        (trace,) = panel.figure.data
        assert len(trace.z) == 84
        assert [sum(row) for row in trace.z] == pytest.approx([100] * 84, abs=0.5)
