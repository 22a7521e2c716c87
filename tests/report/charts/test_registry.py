"""What charts say and draw, against numbers that were found in another way."""

import json
import math
from dataclasses import replace

import pytest
from helpers.records import HOSTILE, federation, history, hostile, large, long_names, merge, score

from lightning_fedfisher.curvature.summary import CurvatureSummary
from lightning_fedfisher.report.charts.registry import charts
from lightning_fedfisher.results.record import (
    ClientRecord,
    FederationRecord,
    ModelScore,
)

NAMES = ["data", "loss", "accuracy", "curvature", "convergence", "clients", "confusion"]


def _chart(record, name):
    (found,) = [chart for chart in charts(record) if chart.name == name]
    return found


def _title(record, name):
    return _chart(record, name).title


def _of(clients=(), merges=(), **rest):
    return FederationRecord("A test", list(clients), list(merges), **rest)


def _holding(*counts):
    return [
        ClientRecord(f"client-{index}", sum(own), list(own)) for index, own in enumerate(counts)
    ]


def _losing(*losses):
    return [
        ClientRecord(f"client-{index}", 9, train_loss=list(own)) for index, own in enumerate(losses)
    ]


def _with(record, **changes):
    return replace(record, merges=[replace(record.merges[0], **changes), *record.merges[1:]])


def _reached(*accuracies, **rest):
    methods = zip(("one", "two", "three"), accuracies, strict=False)
    return _of(merges=[merge(name, accuracy) for name, accuracy in methods], **rest)


def _ended(**residuals):
    merges = [
        replace(merge(name), history=[*history(), {"iterations": 300.0, "residual": residual}])
        for name, residual in residuals.items()
    ]
    return _of(merges=merges)


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
    assert _title(_of(_holding(*counts)), "data") == said


def test_data_counts_only_clients_that_tell():
    clients = [
        *_holding((3, 1), (0, 4)),
        ClientRecord("silent", 1000),
        ClientRecord("none", 0, [0]),
    ]
    chart = _chart(_of(clients), "data")
    assert "of the samples that are told by class" in chart.title
    assert "2 clients that tell no classes left out" in chart.subtitle
    assert "50%" in chart.title


def test_data_adds_up_what_it_draws():
    record = federation(clients=7, classes=12)
    drawn = [[0] * 12 for _ in range(7)]
    for trace in _chart(record, "data").panels[0].figure.data:
        for row, values in zip(drawn, trace.z, strict=True):
            for at, value in enumerate(values):
                row[at] += value or 0
    assert drawn == [client.class_counts for client in record.clients]


def test_data_shows_the_largest_of_many_and_groups_classes():
    counts = [[1 + index] * 250 for index in range(1000)]
    chart = _chart(_of(_holding(*counts)), "data")
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
    assert _title(_of(_losing(*losses)), "loss") == said


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (
            _reached(71, best_client=score(66)),
            "one reaches 71.0%, 5.0 points above the best sing",
        ),
        (
            _reached(60, best_client=score(61)),
            "one reaches 60.0%, 1 point below the best single",
        ),
        (
            _reached(60, best_client=score(60.01)),
            "one reaches 60.0%, level with the best single",
        ),
        (
            _reached(60, ensemble=score(50)),
            "one reaches 60.0%, 10.0 points above the ensemble of",
        ),
        (_reached(60, 80, best_client=score(50)), "best single client; two reaches 80.0%"),
        (_reached(60, 50), "one reaches 60.0%"),
        (_reached(60, 60), "one reaches 60.0%"),
        (_reached(0, best_client=score(0)), "one reaches 0.0%, level with"),
        (_reached(math.nan, 50), "two reaches 50.0%"),
    ],
)
def test_accuracy_says_what_the_first_method_reached(record, said):
    assert said in _title(record, "accuracy")


def test_accuracy_marks_methods_that_used_labels():
    record = federation()
    bars = {bar.name: bar for bar in _chart(record, "accuracy").panels[0].figure.data}
    (used,) = [bar for name, bar in bars.items() if name.startswith("used labelled")]
    assert list(used.x) == [70.0]
    assert used.marker.pattern.shape == "/"
    (free,) = [bar for bar in bars.values() if bar is not used]
    assert list(free.x) == [71.0, 40.0]
    assert used.marker.color != free.marker.color


def test_accuracy_labels_its_lines_one_above_the_other():
    figure = _chart(federation(), "accuracy").panels[0].figure
    assert [note.text for note in figure.layout.annotations] == [
        "best single client 66.0",
        "ensemble of all clients 69.0",
    ]
    low, high = (note.yshift for note in figure.layout.annotations)
    assert high - low >= 16


def test_curvature_says_which_layer_has_most():
    layers = [[("a", 1.0, 3.0), ("b", 2.0, 40.0)], [("a", 0.0, 5.0), ("b", 5.0, 20.0)]]
    clients = [
        ClientRecord(str(index), 1, curvature=[CurvatureSummary(*layer) for layer in own])
        for index, own in enumerate(layers)
    ]
    chart = _chart(_of(clients), "curvature")
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
    _, panel = _chart(record, "curvature").panels
    assert panel.heading == f"Spectrum of {most}"
    assert list(panel.figure.data[0].y)[:3] == pytest.approx([1, 0.6, 0.36])


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (_ended(one=1e-7), "one ends with a residual of 10⁻⁷ after 300 iterations"),
        (_ended(one=1e-7, two=0.02), "10⁻⁷ after 300 iterations, two with 0.02"),
        (_ended(one=0.01, two=0.01), "All 2 iterative methods end with a residual of 0.01"),
        (_ended(one=0.0), "one ends with a residual of 0 after"),
        (_ended(one=math.inf, two=0.1), "one ends without a finite residual"),
        (_ended(one=math.nan, two=math.inf), "one and 1 more end without a finite residual"),
    ],
)
def test_convergence_says_how_close_the_merges_came(record, said):
    assert said in _title(record, "convergence")


def test_convergence_leaves_out_closed_forms_and_waiting_layers():
    record = federation()
    record = _with(record, history=history(steps=5, waiting=3))
    record.merges[1].history[1:] = []
    lines = _chart(record, "convergence").panels[0].figure.data
    assert [line.name for line in lines] == ["fedfisher", "fedfisher_kfac"]
    assert list(lines[0].x) == [80, 100, 120, 140, 160]
    assert list(lines[0].y) == pytest.approx([0.3, 0.09, 0.027, 0.0081, 0.00243])


def test_convergence_is_left_out_where_nothing_has_two_residuals():
    aligned = replace(merge("one"), history=history(steps=1, waiting=3))
    record = _of(merges=[aligned, replace(merge("two"), history=history(steps=1, waiting=0))])
    assert not any(chart.name == "convergence" for chart in charts(record))


def test_convergence_draws_a_method_whose_layers_never_began():
    record = _of(merges=[replace(merge("one"), history=history(steps=0, waiting=3))])
    (line,) = _chart(record, "convergence").panels[0].figure.data
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
    record = _with(
        federation(clients=3), layers=["a", "b"], distances=[[1, 1, 1]] * 2, influence=influence
    )
    assert _title(record, "clients").startswith(said)


@pytest.mark.parametrize(
    ("distances", "said"),
    [
        ([[3, 1, 0], [3, 1, 0]], "90% of the squared distance from the merge is client-0's"),
        ([[3, math.inf, 0], [3, 1, 0]], "client-1 is infinitely far from the merge in a"),
    ],
)
def test_clients_says_who_is_far(distances, said):
    record = _with(federation(clients=3), layers=["a", "b"], distances=distances, influence=[])
    chart = _chart(record, "clients")
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
    record = _with(federation(), **changes)
    assert "clients" not in [chart.name for chart in charts(record)]


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
    record = _of(merges=[merged], best_client=ModelScore(50, 1, 1, before))
    chart = _chart(record, "confusion")
    assert said in chart.title
    assert len(chart.panels) == bool(before) + bool(after)


def test_confusion_rows_add_up_to_a_hundred():
    for panel in _chart(federation(classes=250), "confusion").panels:
        (trace,) = panel.figure.data
        assert len(trace.z) == 84
        assert [sum(row) for row in trace.z] == pytest.approx([100] * 84, abs=0.5)


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
    return _with(replace(record, clients=clients), distances=values, influence=values)


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


def test_lines_are_told_apart_without_colour():
    record = federation(clients=8)
    for panel in _chart(record, "curvature").panels:
        drawn = {(trace.line.dash, trace.marker.symbol) for trace in panel.figure.data}
        assert len(drawn) == 8


def test_many_clients_are_drawn_by_what_they_have_in_common():
    record = federation(clients=50)
    median = sorted(own.train_loss[-1] for own in record.clients)[24:26]
    lines = {line.name: line for line in _chart(record, "loss").panels[0].figure.data}
    assert len(lines) < 8
    assert lines["median client"].y[-1] == pytest.approx(sum(median) / 2)
    worst = max(record.clients, key=lambda own: own.train_loss[-1])
    assert f"ends highest: {worst.name}" in lines


def test_what_stands_out_among_many_is_who_the_title_names():
    record = federation(clients=50)
    chart = _chart(record, "clients")
    for panel in chart.panels:
        (named,) = [trace.name for trace in panel.figure.data if "client-" in trace.name]
        assert named in chart.title


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
