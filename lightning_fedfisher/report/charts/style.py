"""What all charts share: their parts, colours and axes.

Text, grid and background have no colours here: the page sets them, which knows whether it is dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from lightning_fedfisher.report.wording import is_drawn, marked, number

# The colours of Okabe and Ito's palette with a contrast of 3:1 to white and to near black.
BLUE, ORANGE, GREEN, PINK = COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")

MOST_SERIES = 8
"""The most clients or methods that are drawn one by one in a picture."""

MOST_ROWS = 20
"""The most rows of a picture, so that it fits a screen and no labels overlap."""

_NARROW = 170  # pixels that long names leave for an axis on a phone
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"
_LEGEND = {
    "orientation": "h",
    "x": 0,
    "y": 1.02,
    "yanchor": "bottom",
    "traceorder": "normal",
}


@dataclass(frozen=True)
class Panel:
    """One picture of a chart.

    Attributes:
        figure: A plotly figure without a title.
        heading: What the picture shows; empty if the chart has no other.
    """

    figure: go.Figure
    heading: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart and what it says, in plain text that is not escaped.

    Attributes:
        name: A short name, for links to the chart.
        title: What the chart shows, in a sentence.
        subtitle: What is drawn, and what is left out.
        panels: The pictures of the chart.
    """

    name: str
    title: str
    subtitle: str
    panels: list[Panel] = field(default_factory=list)


def figure(traces: Sequence[Any], height: int, x: dict[str, Any], y: dict[str, Any]) -> go.Figure:
    """Makes a plotly figure with the layout that all charts share.

    Args:
        traces: Plotly traces.
        height: The height in pixels.
        x: Plotly's settings of the horizontal axis, ``title`` being a string.
        y: Plotly's settings of the vertical axis, ``title`` being a string.

    Returns:
        The figure, without a title of its own.
    """
    axis = {"automargin": True, "fixedrange": True, "zeroline": False, "ticklen": 0, "tickangle": 0}
    axis |= {"ticklabelstandoff": 6}
    return go.Figure(
        data=list(traces),
        layout={
            "template": "none",
            "height": height,
            "margin": {"l": 8, "r": 14, "t": 10, "b": 8},
            "font": {"family": _FONT, "size": 12},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "legend": _LEGEND,
            "dragmode": False,
            "hoverlabel": {
                "bgcolor": "#20242c",
                "bordercolor": "#8b93a1",
                "font": {"color": "#ffffff", "family": _FONT, "size": 12},
                "namelength": -1,
            },
            "xaxis": axis | titled(x),
            "yaxis": axis | titled(y),
        },
    )


def titled(axis: dict[str, Any]) -> dict[str, Any]:
    """Replaces the ``title`` of an axis, a string, by plotly's settings of a title."""
    title = (
        {"text": marked(axis["title"]), "standoff": 8, "font": {"size": 12}}
        if "title" in axis
        else None
    )
    return {**axis, "title": title}


def log_axis(values: Sequence[float], title: str, upright: bool = False) -> dict[str, Any]:
    """Makes a logarithmic axis with labels at round numbers that stay apart on a phone.

    Args:
        values: Positive numbers that the axis must span.
        title: The axis title.
        upright: Whether the axis is vertical, where labels need less room.

    Returns:
        Plotly's settings of the axis, for `figure`.
    """
    low, high = math.log10(min(values)), math.log10(max(values))
    room = max(0.06 * (high - low), 0.08)
    ends = (low - room, high + room)
    decades = range(math.floor(ends[0]), math.ceil(ends[1]) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        every = [float(f"{step}e{power}") for power in decades for step in steps]
        ticks = [t for t in every if is_drawn(t) and ends[0] <= math.log10(t) <= ends[1]]
        if _have_room(ticks, ends[1] - ends[0], upright):
            break
    while not _have_room(ticks, ends[1] - ends[0], upright):
        ticks = ticks[::2]
    ticks = ticks or [10 ** ((low + high) / 2)]
    return {
        "type": "log",
        "title": title,
        "range": list(ends),
        "tickvals": ticks,
        "ticktext": [number(tick) for tick in ticks],
    }


def round_step(length: int) -> int:
    """Finds the round step between labels that leaves at most twelve of them."""
    steps = (base * ten for ten in (1, 10, 100, 1000, 10**4, 10**5) for base in (1, 2, 5))
    return next(step for step in steps if length <= 12 * step)


def _have_room(ticks: Sequence[float], span: float, upright: bool) -> bool:
    """Tells whether the labels of a logarithmic axis stay apart on a phone."""
    return all(
        math.log10(right / left) / span * _NARROW
        > (20 if upright else 3.4 * len(number(left) + number(right)) + 8)
        for left, right in pairwise(ticks)
    )
