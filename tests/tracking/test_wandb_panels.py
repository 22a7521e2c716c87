"""The panels themselves; `test_wandb_workspace` reads them as they would be sent."""

import re
from itertools import chain

import pytest

from lightning_fedfisher.tracking import logged_keys as keys
from lightning_fedfisher.tracking.wandb_panels import MOST_RUNS, sections

CLIENTS = ["client-0", "ward 3/scanner.b", "a.b/c d", "residual"]
LAYERS = ["network.0", "blocks.1/conv 2", "head (last)", "iterations"]
FAMILIES = [  # what one panel shows together
    {"train_loss", "loss", "train/loss", "val_loss", "validation/loss", "train_loss_epoch"},
    *(
        {f"fedfisher/{kind}{name}/{layer}" for kind in ("", "kfac-mc/") for layer in LAYERS}
        for name in ("trace", "effective_rank")
    ),
    *({name} for name in ("objective", "residual", "iterations")),
    {f"residual/{layer}" for layer in LAYERS},
    *({f"{name}/{client}" for client in CLIENTS} for name in ("distance", "influence")),
]
OTHERS = {  # what no line plot shows
    *("epoch", "trainer/global_step", "_step", "train_loss_step", "losses", "test/loss", "no_loss"),
    *("fedfisher/extraction_seconds", "fedfisher/extracted_samples", "fedfisher/curvature"),
    *(
        "fedfisher/trace",
        "fedfisher/effective_rank/",
        "other/trace/network.0",
        "xfedfisher/trace/a",
    ),
    *(f"iterations/{layer}" for layer in LAYERS),
    *("test/accuracy", "clients", "server_seconds", "fedfisher/upload_bytes"),
    *(
        "val_residual",
        "residuals",
        "my/residual",
        "fedfisher/kfac/residual",
        "distance",
        "distance/",
    ),
}


def _panels():
    rows = chain.from_iterable(section.rows for section in sections())
    return [panel for _, row in rows for panel in row]


def _patterns():
    return {pattern for panel in _panels() if (pattern := getattr(panel, "metric_regex", None))}


def test_every_pattern_matches_one_family_of_keys_and_nothing_else():
    every = OTHERS.union(*FAMILIES)
    found = [{key for key in every if re.search(pattern, key)} for pattern in _patterns()]
    assert sorted(map(sorted, found)) == sorted(map(sorted, FAMILIES))


def test_patterns_are_such_as_go_and_javascript_know():
    for pattern in _patterns():
        assert not re.search(r"\(\?[^:]|\\[^-./]", pattern)


def test_a_row_shares_the_width_of_the_grid():
    section = sections()[1]
    first, second = section.panels()
    assert (first.layout.x, first.layout.y, first.layout.w) == (0, 0, 12)
    assert (second.layout.x, second.layout.y, second.layout.w) == (12, 0, 12)


def test_rows_above_push_the_others_down():
    (alone,), _ = (row for _, row in sections()[0].rows)
    below = sections()[0].panels((3, [alone]))
    assert [panel.layout.y for panel in below] == [0, 3, 11]


def test_panels_are_new_at_every_call():
    first, second = _panels(), _panels()
    assert not {id(panel) for panel in first} & {id(panel) for panel in second}


@pytest.mark.parametrize("panel", _panels(), ids=lambda panel: type(panel).__name__)
def test_panels_show_every_client(panel):
    assert getattr(panel, "max_runs_to_show", MOST_RUNS) == MOST_RUNS
    assert getattr(panel, "aggregate", False) is False


def test_bars_are_of_keys_that_somebody_logs():
    names = {value for name, value in vars(keys).items() if name.isupper()}
    bars = {key for panel in _panels() for key in getattr(panel, "metrics", None) or ()}
    assert len(bars) == 7
    for key in bars:
        assert key.removeprefix(f"{keys.CLIENT_PREFIX}/") in names
