"""Three kinds of picture: lines over epochs or iterations, strips by layer, cells by class.

Lines and strips show every client while there are few, and what they have in common when there are
many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from lightning_fedfisher.report.charts.style import (
    BLUE,
    COLOURS,
    GREEN,
    MOST_SERIES,
    ORANGE,
    figure,
    log_axis,
)
from lightning_fedfisher.report.wording import is_drawn, labels, marked

_SCALE = "Cividis"
_TURN = 0.467  # beyond it black is read more easily than white, and both well
_DASHES = ("solid", "dash")
_SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star", "triangle-down")
_MOST_POINTS = 400


class Series(NamedTuple):
    """A line: its name, and its points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def lines(
    series: Sequence[Series], x: dict[str, Any], y: dict[str, Any], hover: str, height: int = 340
) -> go.Figure:
    """Draws every line, or if there are too many what they have in common.

    Args:
        series: at least one, with points that the axes can hold.
        x: the horizontal axis.
        y: the vertical axis.
        hover: what plotly is to say of a point, after its name.
        height: in pixels.

    Returns:
        A figure.
    """
    if len(series) > MOST_SERIES:
        return figure(_fan(series, hover), height, x, y)
    traces = []
    shorts = labels([own.name for own in series], 30)
    if max(map(len, shorts)) > 15:  # of which a phone has a row for each, above the picture
        height = max(height, 340 + 12 * len(shorts))
    for index, (own, short) in enumerate(zip(series, shorts, strict=True)):
        step = math.ceil(len(own.x) / _MOST_POINTS)
        # From the end: the last point is the one that counts.
        across, up = list(own.x)[::-step][::-1], list(own.y)[::-step][::-1]
        traces.append(_line(own.name, short, across, up, style(index), hover, len(up) <= 30))
    return figure(traces, height, x, y)


def _line(
    name: str,
    short: str,
    x: list[float],
    y: list[float],
    drawn: dict[str, Any],
    hover: str,
    marks: bool,
) -> go.Scatter:
    return go.Scatter(
        x=x,
        y=y,
        name=marked(short),
        meta=marked(name),
        mode="lines+markers" if marks else "lines",
        hovertemplate=f"%{{meta}}<br>{hover}<extra></extra>",
        **drawn,
    )


def _fan(series: Sequence[Series], hover: str) -> list[go.Scatter]:
    shorts = labels([own.name for own in series], 20)
    points: dict[float, list[float]] = {}
    for own in series:
        for across, up in zip(own.x, own.y, strict=True):
            points.setdefault(across, []).append(up)
    xs = sorted(points)
    xs = xs[:: -math.ceil(len(xs) / _MOST_POINTS)][::-1]
    least, low, middle, high, most = (
        [float(np.quantile(points[x], at)) for x in xs] for at in (0, 0.25, 0.5, 0.75, 1)
    )
    traces = []
    for name, bottom, top, depth in (
        ("all clients", least, most, 0.2),
        ("middle half", low, high, 0.36),
    ):
        edge: dict[str, Any] = {"x": xs, "mode": "lines", "hoverinfo": "skip"}
        edge["line"] = {"width": 1, "color": "rgba(0,114,178,.5)"}
        fill = f"rgba(0,114,178,{depth})"
        traces.append(go.Scatter(y=bottom, showlegend=False, **edge))
        traces.append(go.Scatter(y=top, name=name, fill="tonexty", fillcolor=fill, **edge))
    solid = {"line": {"color": BLUE, "width": 2.5}}
    alone = len(xs) == 1  # of which no line can be drawn
    traces.append(_line("median client", "median client", xs, middle, solid, hover, alone))
    for own, colour, dash, what in (
        (max(series, key=lambda own: own.y[-1]), ORANGE, "dash", "ends highest"),
        (min(series, key=lambda own: own.y[-1]), GREEN, "dot", "ends lowest"),
    ):
        drawn = {"line": {"color": colour, "width": 2, "dash": dash}}
        short = f"{what}: {shorts[series.index(own)]}"
        traces.append(_line(own.name, short, list(own.x), list(own.y), drawn, hover, alone))
    return traces


def strip(
    rows: Sequence[str],
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    title: str,
    notable: int,
    at: float | None = None,
) -> go.Figure:
    """Draws a row of points on a logarithmic axis for each layer.

    Args:
        rows: names of layers, at most `MOST_ROWS`.
        names: of clients.
        values: of each layer and client; what is not positive and finite is not drawn.
        title: of the axis.
        notable: the client that is drawn where not all are.
        at: where to draw a line across, if anywhere.

    Returns:
        A figure.
    """
    shown = [v for row in values for v in row if is_drawn(v)]
    few = len(names) <= MOST_SERIES
    traces = [] if few else _spans(values)
    shorts = labels(names, 30)
    for index in range(len(names)) if few else [notable]:
        offset = 0.09 * (index - (len(names) - 1) / 2) if few else 0
        points = [(row[index], y) for y, row in enumerate(values) if is_drawn(row[index])]
        drawn = style(index if few else 1)
        traces.append(
            go.Scatter(
                x=[x for x, _ in points],
                y=[y + offset for _, y in points],
                name=marked(shorts[index]),
                meta=marked(names[index]),
                mode="markers",
                text=[marked(rows[y]) for _, y in points],
                marker=drawn["marker"],
                hovertemplate="%{meta}<br>%{text}: %{x:.3~g}<extra></extra>",
            )
        )
    height = 90 + 24 * len(rows) + (20 if few and len(names) > 4 else 0)
    across = {
        "range": [len(rows) - 0.5, -0.5],
        "tickvals": list(range(len(rows))),
        "ticktext": [marked(name) for name in labels(rows, 18)],
    }
    held = [*shown, at] if at else shown
    made = figure(traces, max(height, 300 if len(rows) > 2 else 220), log_axis(held, title), across)
    if at:
        made.add_vline(at, line={"width": 1.5, "dash": "dot"})
    return made


def _spans(values: Sequence[Sequence[float]]) -> list[go.Scatter]:
    """Of each row the range, its middle half and its median."""
    traces = []
    kept = [[v for v in row if is_drawn(v)] for row in values]
    for name, ends, width in (("all clients", (0, 1), 2), ("middle half", (0.25, 0.75), 8)):
        x: list[float | None] = []
        y: list[float | None] = []
        for index, row in enumerate(kept):
            if row:
                x += [*(float(np.quantile(row, at)) for at in ends), None]
                y += [index, index, None]
        line = {"color": BLUE, "width": width}
        traces.append(go.Scatter(x=x, y=y, name=name, mode="lines", line=line, hoverinfo="skip"))
    middle = [(float(np.median(row)), index) for index, row in enumerate(kept) if row]
    traces.append(
        go.Scatter(
            x=[x for x, _ in middle],
            y=[y for _, y in middle],
            name="median client",
            mode="markers",
            marker={"color": "#ffffff", "size": 8, "line": {"color": BLUE, "width": 2}},
            hovertemplate="median client: %{x:.3~g}<extra></extra>",
        )
    )
    return traces


def heat(
    z: Sequence[Sequence[float]],
    most: float,
    printed: Sequence[Sequence[str]],
    blank: bool,
    **drawn: Any,
) -> list[go.Heatmap]:
    """Cells by their values.

    Args:
        z: values.
        most: that the end of the scale stands for.
        printed: what is written into the cells; nothing if empty.
        blank: whether cells of zero stay empty; they do where the others are printed.
        drawn: what else is told of the traces.

    Returns:
        Traces: one for each colour of text, dark cells having white.
    """
    shared = {"zmin": 0, "zmax": most, "colorscale": _SCALE, "hoverongaps": False, **drawn}
    if not printed:
        return [go.Heatmap(z=[[v or None for v in row] for row in z] if blank else z, **shared)]
    shared |= {"xgap": 1, "ygap": 1, "showscale": False, "texttemplate": "%{text}"}
    traces = []
    for light, colour in ((False, "#ffffff"), (True, "#000000")):
        own = [[bool(v) and (v > _TURN * most) == light for v in row] for row in z]
        traces.append(
            go.Heatmap(
                z=_where(own, z, None),
                text=_where(own, printed, ""),
                textfont={"color": colour, "size": 11},
                **shared,
            )
        )
    return traces


def _where(
    own: Sequence[Sequence[bool]], table: Sequence[Sequence[Any]], other: Any
) -> list[list[Any]]:
    return [
        [value if taken else other for taken, value in zip(chosen, row, strict=True)]
        for chosen, row in zip(own, table, strict=True)
    ]


def bar() -> dict[str, Any]:
    """A colour bar under the picture, where it takes no width from a phone."""
    return {
        "orientation": "h",
        "thickness": 10,
        "len": 1.0,
        "x": 0,
        "xanchor": "left",
        "y": 0,
        "yref": "container",
        "yanchor": "bottom",
        "outlinewidth": 0,
        "nticks": 6,
    }


def style(index: int) -> dict[str, Any]:
    """How the n-th client or method is drawn: no two of `MOST_SERIES` alike without colour."""
    colour = COLOURS[index % len(COLOURS)]
    symbol = _SYMBOLS[index % len(_SYMBOLS)]
    return {
        "line": {"color": colour, "width": 2, "dash": _DASHES[index // 4 % len(_DASHES)]},
        "marker": {"color": colour, "symbol": symbol, "size": 8},
    }
