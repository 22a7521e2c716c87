import math

import pytest

from lightning_fedfisher.report.wording import label, labels, number, percent


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (999.4, "999"),
        (999.6, "1,000"),
        (12345, "12,300"),
        (1e6, "10⁶"),
        (9.1e-7, "9.1 \u00d7 10⁻⁷"),
        (9.96e-5, "10⁻⁴"),
        (-4e-9, "-4 \u00d7 10⁻⁹"),
        (math.inf, "infinite"),
        (math.nan, "not a number"),
    ],
)
def test_numbers_in_words(value, said):
    assert number(value) == said


@pytest.mark.parametrize(
    ("part", "said"),
    [(0, "0%"), (1, "less than 0.1%"), (5, "0.5%"), (410, "41%"), (995, "99.5%"), (1000, "100%")],
)
def test_shares_in_words(part, said):
    assert percent(part, 1000 if part != 1 else 10**5) == said


def test_labels_are_short_and_keep_both_ends():
    assert label("a" * 30 + "b" * 30, 11) == "aaaaa…bbbbb"
    assert label("short") == "short"
    assert label(" \n") == "?"
    assert label("") == "(no name)"
    assert label("漢" * 30, 11) == "漢漢漢…漢漢"
    names = [f"model.encoder.layers.{index}.out" for index in range(12)]
    assert labels(names, 20) == [f"…{index}.out" for index in range(12)]
    assert labels([f"site-{index}.a.very.long.domain.org" for index in range(3)], 20) == [
        f"site-{index}…" for index in range(3)
    ]
    assert labels(["note" * 9] * 2, 9) == ["note…note"] * 2
    assert labels(["a" * 20, "a" * 20 + ".b"], 12)[1] != labels(["a" * 20, "a" * 20 + ".b"], 12)[0]
