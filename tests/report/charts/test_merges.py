"""What the charts of merges say and draw, against numbers that were found in another way."""

import math
from dataclasses import replace

import pytest
from helpers.charts import (
    chart_of,
    merges_ending,
    record_of,
    title_of,
    with_first_merge,
)
from helpers.records import federation, history, merge

from lightning_fedfisher.report.charts.registry import charts


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (merges_ending(one=1e-7), "one ends with a residual of 10⁻⁷ after 300 iterations"),
        (merges_ending(one=1e-7, two=0.02), "10⁻⁷ after 300 iterations, two with 0.02"),
        (merges_ending(one=0.01, two=0.01), "All 2 iterative methods end with a residual of 0.01"),
        (merges_ending(one=0.0), "one ends with a residual of 0 after"),
        (merges_ending(one=math.inf, two=0.1), "one ends without a finite residual"),
        (merges_ending(one=math.nan, two=math.inf), "one and 1 more end without a finite residual"),
    ],
)
def test_convergence_says_how_close_the_merges_came(record, said):
    assert said in title_of(record, "convergence")


def test_convergence_leaves_out_closed_forms_and_waiting_layers():
    record = federation()
    record = with_first_merge(record, history=history(steps=5, waiting=3))
    record.merges[1].history[1:] = []
    lines = chart_of(record, "convergence").panels[0].figure.data
    assert [line.name for line in lines] == ["fedfisher", "fedfisher_kfac"]
    assert list(lines[0].x) == [80, 100, 120, 140, 160]
    assert list(lines[0].y) == pytest.approx([0.3, 0.09, 0.027, 0.0081, 0.00243])


def test_convergence_is_left_out_where_nothing_has_two_residuals():
    aligned = replace(merge("one"), history=history(steps=1, waiting=3))
    record = record_of(merges=[aligned, replace(merge("two"), history=history(steps=1, waiting=0))])
    assert not any(chart.name == "convergence" for chart in charts(record))


def test_convergence_draws_a_method_whose_layers_never_began():
    record = record_of(merges=[replace(merge("one"), history=history(steps=0, waiting=3))])
    (line,) = chart_of(record, "convergence").panels[0].figure.data
    assert list(line.y) == [1, 1, 1]


@pytest.mark.parametrize(
    ("influence", "said"),
    [
        (
            [[1, 1, 1], [1, 7, 0.5]],
            "client-1 weighs up to 7 times as much as the median client, in b",
        ),
        ([[1, 1, 1], [1, 1.5, 0.5]], "No client weighs more than 1.5 times the median client"),
        (
            [[1, 1, math.inf], [1, 1, 1]],
            "client-2 weighs up to infinitely more than the median",
        ),
        ([[0, 0, 0], [0, 0, 0]], "No client weighs more than 0 times the median client"),
    ],
)
def test_clients_says_who_decides(influence, said):
    record = with_first_merge(
        federation(clients=3), layers=["a", "b"], distances=[[1, 1, 1]] * 2, influence=influence
    )
    assert title_of(record, "clients").startswith(said)


@pytest.mark.parametrize(
    ("distances", "said"),
    [
        ([[3, 1, 0], [3, 1, 0]], "90% of the squared distance from the merge is client-0's"),
        ([[3, math.inf, 0], [3, 1, 0]], "client-1 is infinitely far from the merge in a"),
    ],
)
def test_clients_says_who_is_far(distances, said):
    record = with_first_merge(
        federation(clients=3), layers=["a", "b"], distances=distances, influence=[]
    )
    chart = chart_of(record, "clients")
    assert chart.title == said
    assert [panel.heading for panel in chart.panels] == ["Distance from the merge"]
    assert "zero or infinite left out" in chart.subtitle


def test_clients_is_left_out_where_there_is_only_one():
    assert "clients" not in [chart.name for chart in charts(federation(clients=1))]


@pytest.mark.parametrize(
    "changes",
    [
        {"distances": [], "influence": []},
        {"distances": [[0.0] * 5] * 2, "influence": [[0.0] * 5] * 2},
        {"distances": [[1.0] * 4] * 2, "influence": [[1.0] * 5]},
    ],
)
def test_clients_is_left_out_without_a_value_for_each(changes):
    record = with_first_merge(federation(), **changes)
    assert "clients" not in [chart.name for chart in charts(record)]


def test_what_stands_out_among_many_is_who_the_title_names():
    record = federation(clients=50)
    chart = chart_of(record, "clients")
    for panel in chart.panels:
        (named,) = [trace.name for trace in panel.figure.data if "client-" in trace.name]
        assert named in chart.title
