"""The panels of a federation's W&B dashboards, by the questions that they answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import wandb_workspaces.reports.v2 as wr

from lightning_fedfisher.influence import USUAL
from lightning_fedfisher.methods import METHODS

MOST_RUNS = 100
"""Runs that a panel shows at most: W&B's own 10 would hide clients."""

_COLUMNS = 24  # of a report's grid


class Section(NamedTuple):
    """Panels that answer one question.

    Attributes:
        title: the question.
        text: what to look for; W&B's tables have no title of their own to tell it.
        rows: of panels, each with its height, that share the width of the grid.
    """

    title: str
    text: str
    rows: Sequence[tuple[int, Sequence[Any]]]

    def panels(self, *above: tuple[int, Sequence[Any]]) -> list[Any]:
        """Lays out every panel, row by row.

        Args:
            *above: further rows, at the top.

        Returns:
            The panels.
        """
        top, laid = 0, []
        for height, row in [*above, *self.rows]:
            width = _COLUMNS // len(row)
            for index, panel in enumerate(row):
                panel.layout = wr.Layout(x=index * width, y=top, w=width, h=height)
                laid.append(panel)
            top += height
        return laid


def sections(prefix: str) -> list[Section]:
    """Makes every panel anew.

    Args:
        prefix: of what clients log.

    Returns:
        The questions, from the data to the costs.
    """
    return [
        Section(
            "Who holds what",
            "How unlike the clients' data are. A client that holds few classes learns nothing of "
            "the others, and the plain average of such models is poor. The table, where a "
            "simulation may know it, counts samples by client and class.",
            [
                (8, [_bars("data/classes", "class", "samples", "Few classes: a one-sided client")]),
                (8, [wr.WeavePanelSummaryTable(table_name="partition")]),
            ],
        ),
        Section(
            "How the clients trained",
            "Each client for itself. Losses should fall and level off; one that does not is of a "
            "client that trained too little, or on too little.",
            [
                (
                    9,
                    [
                        _lines(
                            _LOSS, "Loss by epoch: every client levels off", x="epoch", log=True
                        ),
                        _values(
                            ["test/accuracy"], "Accuracy by run: is a merge above every client?"
                        ),
                    ],
                )
            ],
        ),
        Section(
            "What the curvature says",
            "What a client insists on. Where the trace is large a change of that layer costs the "
            "client much; where the effective rank is low it cares about few directions only, and "
            "leaves the others to the rest. The table has both by layer.",
            [
                (9, [_spectrum(prefix)]),
                (
                    8,
                    [
                        _lines(
                            _client(prefix, "trace/.+"),
                            "Trace by layer: no client should tower over the others",
                            log=True,
                        ),
                        _lines(
                            _client(prefix, "effective_rank/.+"),
                            "Effective rank by layer: low where few directions matter",
                            log=True,
                        ),
                    ],
                ),
                (8, [wr.WeavePanelSummaryTable(table_name=f"{prefix}/curvature")]),
            ],
        ),
        Section(
            "How the merge went",
            "Whether the server found the minimum, and whose it is. The residual should end low in "
            "every layer. Far from one client and near to the others: that one was outvoted. "
            f"Influence is in multiples of the median client's, and above {USUAL:g} unusual.",
            [
                (
                    8,
                    [
                        _lines(_merge("objective"), "Objective: falls, then stays", log=True),
                        _lines(_merge("residual"), "Residual: ends low if it converged", log=True),
                        _lines(_merge("iterations"), "Iterations: levels off when all are done"),
                    ],
                ),
                (
                    8,
                    [
                        _lines(
                            _merge("residual/.+"),
                            "Residual by layer: is one not solved?",
                            log=True,
                        ),
                        _lines(
                            _merge("distance/.+"),
                            "Distance by client: the farthest was outvoted",
                        ),
                        _lines(
                            _merge("influence/.+"),
                            f"Influence by client: look at those above {USUAL:g}",
                            log=True,
                        ),
                    ],
                ),
                (8, [wr.WeavePanelSummaryTable(table_name=name) for name in _CLIENTS]),
            ],
        ),
        Section(
            "What was gained",
            "The merged model against the best single client, and against the ensemble of all "
            "clients, which runs every model at every prediction. The best client's confusion "
            "matrix has empty columns, of classes that it never saw.",
            [
                (
                    9,
                    [
                        _bars(
                            "accuracy",
                            "model",
                            "accuracy, %",
                            "Accuracy: is the merge above the best client?",
                        )
                    ],
                ),
                (8, [wr.WeavePanelSummaryTable(table_name="comparison")]),
                (
                    11,
                    [
                        _confusion(
                            "confusion/before", "Best client: which classes does it never name?"
                        ),
                        _confusion("confusion/after", "Merged: is the diagonal filled?"),
                    ],
                ),
                (
                    8,
                    [
                        _values(_both("test/accuracy"), "Accuracy, %: higher is better"),
                        _values(_both("test/nll"), "Negative log-likelihood: lower is better"),
                        _values(
                            _both("test/calibration_error"), "Calibration error, %: lower is better"
                        ),
                    ],
                ),
            ],
        ),
        Section(
            "What it cost",
            "One upload from each client, one extraction after its training, one merge. The table "
            "of the section before has FedAvg's bytes beside these.",
            [
                (
                    8,
                    [
                        _values(
                            list(dict.fromkeys([f"{prefix}/upload_bytes", *_both("upload_bytes")])),
                            "Bytes sent, once: near those of the weights?",
                        ),
                        _values(
                            _both("server_seconds"),
                            "Seconds of the merge: how it grows with clients",
                        ),
                    ],
                ),
                (
                    8,
                    [
                        _values(
                            [f"{prefix}/extraction_seconds"],
                            "Seconds of extraction: short beside the training?",
                        ),
                        _values(
                            [f"{prefix}/curvature_samples"],
                            "Samples behind the curvature: few make it noisy",
                        ),
                    ],
                ),
            ],
        ),
    ]


_LOSS = "^(?:(?:train|training|val|valid|validation)[_/])?loss(?:_epoch)?$"
_CLIENTS = ("clients", "fedfisher/clients")  # of the default method, where several share a run


def _client(prefix: str, key: str) -> str:
    """Matches what clients log, of one callback or of several side by side."""
    return f"^{re.escape(prefix)}/(?:[^/]+/)?{key}$"


def _merge(key: str) -> str:
    """Matches what a merge logs, in a run of its own or below its method's name."""
    # No lookaround: W&B matches on its server, whose regular expressions have none.
    return f"^(?:(?:{'|'.join(map(re.escape, METHODS))})/)?{key}$"


def _both(key: str) -> list[str]:
    """The same by name, for panels that take no regular expression."""
    return [key, *(f"{method}/{key}" for method in METHODS)]


def _lines(pattern: str, title: str, x: str = "trainer/global_step", log: bool = False) -> Any:
    # Never aggregated: grouped runs would make one line of all clients.
    return wr.LinePlot(
        title=title,
        x=x,
        metric_regex=pattern,
        log_y=log,
        aggregate=False,
        max_runs_to_show=MOST_RUNS,
    )


def _values(keys: Sequence[str], title: str) -> Any:
    return wr.BarPlot(
        title=title,
        metrics=list(keys),
        aggregate=False,
        max_runs_to_show=MOST_RUNS,
        max_bars_to_show=MOST_RUNS,
    )


def _bars(key: str, label: str, value: str, title: str) -> Any:
    return _chart(key, "wandb/bar/v0", {"label": label, "value": value}, {"title": title})


def _spectrum(prefix: str) -> Any:
    fields = {name: name for name in ("step", "lineKey", "lineVal")}
    title = "Eigenvalues of the curvature: steep where few directions matter"
    words = {"title": title, "xname": "rank, as a share of all"}
    return _chart(f"{prefix}/spectrum", "wandb/lineseries/v0", fields, words)


def _confusion(key: str, title: str) -> Any:
    fields = {name: name for name in ("Actual", "Predicted", "nPredictions")}
    return _chart(key, "wandb/confusion_matrix/v1", fields, {"title": title})


def _chart(key: str, kind: str, fields: Mapping[str, str], words: Mapping[str, str]) -> Any:
    """A custom chart that was logged under a key, drawn as W&B itself would draw it."""
    asked: dict[str, Any] = dict.fromkeys(("id", "name", "_defaultColorIndex"))
    return wr.CustomChart(
        query={**asked, "summaryTable": {"tableKey": f"{key}_table"}},
        chart_name=kind,
        chart_fields=dict(fields),
        chart_strings=dict(words),
    )
