"""Three kinds of picture: lines over epochs or iterations, strips by layer, cells by class.

Lines and strips show every client if there are few, and quantiles over the clients if there are
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
_BLACK_FROM = 0.467  # of the scale: from here on black text has more contrast than white
_DASHES = ("solid", "dash")
_SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star", "triangle-down")
_MOST_POINTS = 400


class Series(NamedTuple):
    """A line of a picture: its name and its points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def lines(
    series: Sequence[Series], x: dict[str, Any], y: dict[str, Any], hover: str, height: int = 340
) -> go.Figure:
    """Draws one line for each client or method, or quantiles of them if there are too many.

    Args:
        series: At least one line, with points that the axes can hold.
        x: The horizontal axis, as for `figure`.
        y: The vertical axis, as for `figure`.
        hover: Plotly's template of a point's label, below the name of its line.
        height: The height in pixels.

    Returns:
        A figure with every line if there are at most `MOST_SERIES` of them.
    """
    if len(series) > MOST_SERIES:
        return figure(_fan(series, hover), height, x, y)
    traces = []
    shorts = labels([own.name for own in series], 30)
    if max(map(len, shorts)) > 15:  # a phone gives each such name a row, above the picture
        height = max(height, 340 + 12 * len(shorts))
    for index, (own, short) in enumerate(zip(series, shorts, strict=True)):
        step = math.ceil(len(own.x) / _MOST_POINTS)
        # Thinned from the end, so that the last point is kept.
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
    """Makes the trace of one line, with its full name in the label of its points."""
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
    """Makes the traces of range, middle half and median, and of the two lines that end apart."""
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
    alone = len(xs) == 1  # one point makes no line
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
        rows: The names of at most `MOST_ROWS` layers.
        names: The clients' names.
        values: One value for each layer (rows) and client (columns); those that are not positive
            and finite are not drawn.
        title: The axis title.
        notable: Index of the client that is drawn if there are too many to draw them all.
        at: The value at which a line crosses all rows; None for no line.

    Returns:
        A figure with every client if there are at most `MOST_SERIES` of them.
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
    """Makes the traces of each row's range, middle half and median."""
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
    """Makes the traces of a table of cells, coloured by their values.

    Args:
        z: The values, row by row.
        most: The value at the end of the colour scale, which starts at zero.
        printed: The text of each cell; empty if no cell has a text.
        blank: Whether cells of zero have no colour; with `printed` they never have.
        drawn: Plotly's further settings of the traces.

    Returns:
        One trace, or with `printed` two: dark cells with white text, and light ones with black.
    """
    shared = {"zmin": 0, "zmax": most, "colorscale": _SCALE, "hoverongaps": False, **drawn}
    if not printed:
        return [go.Heatmap(z=[[v or None for v in row] for row in z] if blank else z, **shared)]
    shared |= {"xgap": 1, "ygap": 1, "showscale": False, "texttemplate": "%{text}"}
    traces = []
    for light, colour in ((False, "#ffffff"), (True, "#000000")):
        own = [[bool(v) and (v > _BLACK_FROM * most) == light for v in row] for row in z]
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
    """Copies a table and replaces the values that are not chosen."""
    return [
        [value if taken else other for taken, value in zip(chosen, row, strict=True)]
        for chosen, row in zip(own, table, strict=True)
    ]


def bar() -> dict[str, Any]:
    """Makes the settings of a colour bar below the picture, where a phone has room for it."""
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
    """Makes line and marker of the n-th client; `MOST_SERIES` differ even without colour."""
    colour = COLOURS[index % len(COLOURS)]
    symbol = _SYMBOLS[index % len(_SYMBOLS)]
    return {
        "line": {"color": colour, "width": 2, "dash": _DASHES[index // 4 % len(_DASHES)]},
        "marker": {"color": colour, "symbol": symbol, "size": 8},
    }
