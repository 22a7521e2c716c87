"""Axes have few and round labels, and colours can be seen on white and on black."""

import math

import pytest

from lightning_fedfisher.report.charts.style import COLOURS, figure, log_axis, round_step

DARK = "#14171c"  # the page's ground where a browser is dark


@pytest.mark.parametrize(
    ("length", "step"), [(1, 1), (12, 1), (13, 2), (24, 2), (25, 5), (100, 10), (1000, 100)]
)
def test_at_most_twelve_labels_are_a_round_step_apart(length, step):
    assert round_step(length) == step


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([1, 100], ["1", "3", "10", "30", "100"]),
        ([1, 4], ["1", "2"]),
        ([3, 3], ["3"]),
        ([1e-6, 1], ["10⁻⁶", "10⁻⁴", "0.01", "1"]),
    ],
)
def test_a_logarithmic_axis_has_round_labels_within_its_range(values, labels):
    axis = log_axis(values, "what")
    low, high = axis["range"]
    assert low < math.log10(min(values)) <= math.log10(max(values)) < high
    assert all(low <= math.log10(tick) <= high for tick in axis["tickvals"])
    assert axis["ticktext"] == labels
    assert (axis["type"], axis["title"]) == ("log", "what")


def test_an_upright_axis_has_room_for_more_labels():
    flat, upright = (log_axis([1, 100], "", upright=up) for up in (False, True))
    assert len(upright["tickvals"]) > len(flat["tickvals"])


def _light(colour):
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(part * c for part, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_stand_out_from_white_and_from_near_black(colour):
    assert 1.05 / (_light(colour) + 0.05) >= 3
    assert (_light(colour) + 0.05) / (_light(DARK) + 0.05) >= 3


def test_a_figure_leaves_title_text_and_ground_to_the_page():
    made = figure([], 300, {"title": "a <b>"}, {})
    assert made.layout.title.text is None
    assert made.layout.font.color is None
    assert made.layout.paper_bgcolor == made.layout.plot_bgcolor == "rgba(0,0,0,0)"
    assert "<b>" not in made.layout.xaxis.title.text
    assert made.layout.yaxis.title.text is None
    assert made.layout.height == 300
