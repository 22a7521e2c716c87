"""Charts of how good the models are: every method's accuracy, and which classes are confused."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from lightning_fedfisher.report.charts.plots import (
    bar,
    heat,
)
from lightning_fedfisher.report.charts.style import (
    BLUE,
    MOST_ROWS,
    ORANGE,
    Chart,
    Panel,
    figure,
    round_step,
)
from lightning_fedfisher.report.wording import (
    count,
    is_known,
    label,
    marked,
    percent,
    sentences,
)
from lightning_fedfisher.results.record import FederationRecord, MergeRecord, ModelScore

_MOST_CLASSES, _MOST_PRINTED = 100, 10


def accuracy_chart(record: FederationRecord) -> Chart | None:
    """Draws the test accuracy of every method beside the best client and the ensemble.

    Args:
        record: The record of the federation.

    Returns:
        The chart; None if no merge was tested.
    """
    bars = _tested(record)
    if not bars:
        return None
    ranked = sorted(bars, key=lambda own: -own[1])
    shown = ranked[:MOST_ROWS]
    traces = []
    labelled = any(merge.server_labels for merge, _ in shown)
    for used, colour, shape, name in (
        (False, BLUE, "", "needs no labels on the server"),
        (True, ORANGE, "/", "used labelled data on the server"),
    ):
        own = [(y, m, a) for y, (m, a) in enumerate(shown) if bool(m.server_labels) == used]
        if own:
            pattern = {
                "shape": shape,
                "fgcolor": "rgba(255,255,255,.55)",
                "size": 6,
                "fillmode": "overlay",
            }
            traces.append(
                go.Bar(
                    orientation="h",
                    x=[accuracy for _, _, accuracy in own],
                    y=[y for y, _, _ in own],
                    name=name,
                    marker={"color": colour, "pattern": pattern, "line": {"width": 0}},
                    text=[
                        f"{marked(m.method)}: {a:.1f}%"
                        + (f"<br>{count(m.server_labels, 'label')}" if m.server_labels else "")
                        for _, m, a in own
                    ],
                    textposition="none",
                    hovertemplate="%{text}<extra></extra>",
                    showlegend=labelled,
                )
            )
    y = {
        "range": [len(shown) - 0.5, -0.5],
        "tickvals": list(range(len(shown))),
        "ticktext": [f"{marked(label(m.method, 18))}  <b>{a:.1f}</b>" for m, a in shown],
    }
    x = {"title": "test accuracy, %", "range": [0, 100], "nticks": 6}
    made = figure(traces, 130 + 25 * len(shown), x, y)
    made.update_layout(bargap=0.3, margin_t=46)
    made.update_layout(legend={"y": 0, "yref": "container", "yanchor": "bottom"})
    # Each label has a row of its own, since the two lines may be near each other.
    for name, score, dash, up in (
        ("best single client", record.best_client, "dot", 2),
        ("ensemble of all clients", record.ensemble, "dash", 20),
    ):
        at = _accuracy(score)
        if is_known(at):
            made.add_vline(at, line={"width": 2, "dash": dash})
            made.add_annotation(
                x=at,
                y=1,
                yref="paper",
                text=f"{name} {at:.1f}",
                showarrow=False,
                xanchor="right" if at > 50 else "left",
                yanchor="bottom",
                yshift=up,
            )
    return Chart(
        "accuracy",
        accuracy_finding(record),
        sentences(
            f"Test accuracy of {_best_of(len(shown), len(ranked), 'method')}, best first",
            "Hatched: picks its model by labelled samples on the server" if labelled else "",
        ),
        [Panel(made)],
    )


def accuracy_finding(record: FederationRecord) -> str:
    """Says what accuracy the first tested merge reaches, and compares it.

    Args:
        record: The record of the federation.

    Returns:
        A sentence without its full stop; empty if no merge was tested.
    """
    bars = _tested(record)
    if not bars:
        return ""
    first, reached = bars[0]
    told = f"{label(first.method, 40)} reaches {reached:.1f}%"
    for name, score in (
        ("the best single client", record.best_client),
        ("the ensemble of all clients", record.ensemble),
    ):
        other = _accuracy(score)
        if is_known(other):
            gap = f"{abs(reached - other):.1f}"
            points = "1 point" if gap == "1.0" else f"{gap} points"
            side = "above" if reached > other else "below"
            told += f", level with {name}" if gap == "0.0" else f", {points} {side} {name}"
            break
    best, most = max(bars, key=lambda own: own[1])
    if f"{most:.1f}" != f"{reached:.1f}":
        told += f"; {label(best.method, 40)} reaches {most:.1f}%"
    return told


def confusion_chart(record: FederationRecord) -> Chart | None:
    """Draws the confusion matrices of the best single client and of the first merged model.

    Args:
        record: The record of the federation.

    Returns:
        The chart; None if neither has a confusion matrix.
    """
    before = _square(record.best_client)
    merged = [(merge.method, _square(merge.score)) for merge in record.merges]
    method, after = next((own for own in merged if own[1]), ("", []))
    matrices = [("Best single client", before), (label(method, 30), after)]
    matrices = [(name, counts) for name, counts in matrices if counts]
    if not matrices:
        return None
    group = math.ceil(max(len(counts) for _, counts in matrices) / _MOST_CLASSES)
    panels = [Panel(_confusion(counts, group), name) for name, counts in matrices]
    if len(matrices) == 2 and len(before) == len(after):
        title = _change(label(method, 40), _recalls(before), _recalls(after))
    else:
        name = "The best single client" if before else label(method, 40)
        title = _mistake(name, before or after)
    return Chart(
        "confusion",
        title,
        sentences(
            "What test samples of each true class are taken for, in % of the class",
            f"Classes are added up in groups of {group}" if group > 1 else "",
        ),
        panels,
    )


def _square(score: ModelScore | None) -> list[list[int]]:
    """Reads a confusion matrix; empty if it is missing, not square or all zero."""
    counts = score.confusion if score else []
    whole = all(len(row) == len(counts) for row in counts) and any(map(any, counts))
    return counts if whole else []


def _confusion(counts: list[list[int]], group: int) -> go.Figure:
    """Draws a confusion matrix in percent of the true class, its classes added up in groups."""
    starts = range(0, len(counts), group)
    sums = [
        [sum(sum(row[x : x + group]) for row in counts[y : y + group]) for x in starts]
        for y in starts
    ]
    shares = [[100 * n / (sum(row) or 1) for n in row] for row in sums]
    few = len(sums) <= _MOST_PRINTED
    traces = heat(
        [[round(share, 2) for share in row] for row in shares],
        100,
        [[f"{share:.0f}" for share in row] for row in shares] if few else [],
        False,
        colorbar=bar(),
        hovertemplate="true %{y}, predicted %{x}: %{z:.1f}%<extra></extra>",
    )
    step = max(group, round_step(len(counts)))
    ticks = {
        "tickvals": [tick / group for tick in range(0, len(counts), step)],
        "ticktext": [str(tick) for tick in range(0, len(counts), step)],
    }
    x = {"title": "predicted class", **ticks}
    y = {"title": "true class", "autorange": "reversed", **ticks}
    return figure(traces, 360 if few else 430, x, y)


def _recalls(counts: Sequence[Sequence[int]]) -> list[float | None]:
    """Computes each class's recall in percent; None for classes without samples."""
    return [100 * row[at] / sum(row) if any(row) else None for at, row in enumerate(counts)]


def _change(method: str, before: Sequence[float | None], after: Sequence[float | None]) -> str:
    """Says in how many classes a merge is right more often than the best single client."""
    pairs = enumerate(zip(before, after, strict=True))
    gains = {at: new - old for at, (old, new) in pairs if old is not None and new is not None}
    more = [at for at in gains if gains[at] > 0]
    less = [at for at in gains if gains[at] < 0]
    if not more and not less:
        return f"{method} is right as often as the best single client in every class"
    how, them = ("more", more) if more else ("less", less)
    most = max(them, key=lambda at: abs(gains[at]))
    return (
        f"{method} is right {how} often than the best single client in {len(them)} of "
        f"{len(gains)} classes; in class {most} in {_whole(after[most])} of cases, "
        f"not {_whole(before[most])}"
    )


def _whole(share: float | None) -> str:
    """Writes a recall in percent."""
    return percent(share or 0.0, 100)


def _mistake(name: str, counts: Sequence[Sequence[int]]) -> str:
    """Names the most frequent mistake of a model."""
    wrong = [
        (n / sum(row), true, predicted)
        for true, row in enumerate(counts)
        for predicted, n in enumerate(row)
        if n and true != predicted
    ]
    if not wrong:
        return f"{name} makes no mistake"
    share, true, predicted = max(wrong)
    return f"{name} takes {percent(share, 1)} of class {true} for class {predicted}"


def _accuracy(score: ModelScore | None) -> float | None:
    """Reads the accuracy of a score; None if it is missing or not finite."""
    return score.accuracy if score and is_known(score.accuracy) else None


def _tested(record: FederationRecord) -> list[tuple[MergeRecord, float]]:
    """Lists the merges with a known accuracy, and that accuracy."""
    scored = [(merge, _accuracy(merge.score)) for merge in record.merges]
    return [(merge, accuracy) for merge, accuracy in scored if accuracy is not None]


def _best_of(shown: int, there: int, what: str) -> str:
    """Says how many of the things there are shown, if not all."""
    return f"the {shown} best of {there} {what}s" if shown < there else f"each {what}"
