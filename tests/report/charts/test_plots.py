"""Pictures stay readable: lines apart, many clients summed up, text that stands out."""

import math

import pytest
from helpers.charts import chart_of
from helpers.records import federation

from lightning_fedfisher.report.charts.plots import Series, heat, lines, strip
from lightning_fedfisher.report.charts.style import MOST_SERIES


def test_lines_are_told_apart_without_colour():
    record = federation(clients=8)
    for panel in chart_of(record, "curvature").panels:
        drawn = {(trace.line.dash, trace.marker.symbol) for trace in panel.figure.data}
        assert len(drawn) == 8


def test_many_clients_are_drawn_by_what_they_have_in_common():
    record = federation(clients=50)
    median = sorted(own.train_loss[-1] for own in record.clients)[24:26]
    lines = {line.name: line for line in chart_of(record, "loss").panels[0].figure.data}
    assert len(lines) < 8
    assert lines["median client"].y[-1] == pytest.approx(sum(median) / 2)
    worst = max(record.clients, key=lambda own: own.train_loss[-1])
    assert f"ends highest: {worst.name}" in lines


@pytest.mark.parametrize("points", [400, 401, 1000])
def test_a_long_line_is_thinned_and_keeps_its_end(points):
    x = list(range(points))
    (line,) = lines([Series("a", x, x)], {}, {}, "").data
    assert len(line.x) <= 400
    assert line.x[-1] == line.y[-1] == points - 1
    steps = {after - before for before, after in zip(line.x, line.x[1:], strict=False)}
    assert steps == {1 if points == 400 else math.ceil(points / 400)}


def test_a_strip_draws_what_is_positive_and_finite():
    figure = strip(["top", "low"], ["a", "b"], [[1.0, math.inf], [0.0, 2.0]], "t", 0, at=1.0)
    drawn = {trace.name: (trace.text, trace.x) for trace in figure.data}
    assert drawn == {"a": (("top",), (1.0,)), "b": (("low",), (2.0,))}
    assert list(figure.layout.yaxis.ticktext) == ["top", "low"]
    assert [line.x0 for line in figure.layout.shapes] == [1.0]


def test_a_strip_of_many_clients_names_one():
    names = [f"client-{index}" for index in range(MOST_SERIES + 1)]
    values = [[float(1 + index) for index in range(len(names))]]
    traces = {t.name: t for t in strip(["layer"], names, values, "t", notable=3).data}
    assert traces.keys() == {"all clients", "middle half", "median client", "client-3"}
    assert list(traces["all clients"].x)[:2] == [1, len(names)]
    assert list(traces["middle half"].x)[:2] == [3, 7]
    assert list(traces["median client"].x) == [5]


def test_cells_have_text_that_stands_out_from_their_colour():
    dark, light = heat([[0, 1, 9]], 10, [["", "1", "9"]], blank=True)
    assert (dark.textfont.color, light.textfont.color) == ("#ffffff", "#000000")
    assert [list(trace.z[0]) for trace in (dark, light)] == [[None, 1, None], [None, None, 9]]
    assert [list(trace.text[0]) for trace in (dark, light)] == [["", "1", ""], ["", "", "9"]]


@pytest.mark.parametrize(("blank", "first"), [(True, None), (False, 0)])
def test_cells_of_zero_may_have_no_colour(blank, first):
    (trace,) = heat([[0, 2]], 2, [], blank)
    assert list(trace.z[0]) == [first, 2]
