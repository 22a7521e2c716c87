"""The panels of a federation's W&B dashboards, by the questions that they answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import wandb_workspaces.reports.v2 as wr

from lightning_fedfisher.merge.influence_cap import DEFAULT_MAX_INFLUENCE

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


def sections() -> list[Section]:
    """Makes every panel anew.

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
                (9, [_spectrum()]),
                (
                    8,
                    [
                        _lines(
                            _client("trace/.+"),
                            "Trace by layer: no client should tower over the others",
                            log=True,
                        ),
                        _lines(
                            _client("effective_rank/.+"),
                            "Effective rank by layer: low where few directions matter",
                            log=True,
                        ),
                    ],
                ),
                (8, [wr.WeavePanelSummaryTable(table_name="fedfisher/curvature")]),
            ],
        ),
        Section(
            "How the merge went",
            "Whether the server found the minimum, and whose it is. The residual should end low in "
            "every layer. Far from one client and near to the others: that one was outvoted. "
            "Influence is in multiples of the median client's, and above "
            f"{DEFAULT_MAX_INFLUENCE:g} unusual.",
            [
                (
                    8,
                    [
                        _lines(
                            "^objective$", "Objective: falls, then stays", x="iterations", log=True
                        ),
                        _lines(
                            "^residual$",
                            "Residual: ends low if it converged",
                            x="iterations",
                            log=True,
                        ),
                        _lines("^iterations$", "Iterations: levels off when all are done"),
                    ],
                ),
                (
                    8,
                    [
                        _lines(
                            "^residual/.+$",
                            "Residual by layer: is one not solved?",
                            log=True,
                        ),
                        _lines(
                            "^distance/.+$",
                            "Distance by client: the farthest was outvoted",
                        ),
                        _lines(
                            "^influence/.+$",
                            f"Influence by client: look at those above {DEFAULT_MAX_INFLUENCE:g}",
                            log=True,
                        ),
                    ],
                ),
                (8, [wr.WeavePanelSummaryTable(table_name="clients")]),
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
                        _values(["test/accuracy"], "Accuracy, %: higher is better"),
                        _values(["test/nll"], "Negative log-likelihood: lower is better"),
                        _values(
                            ["test/calibration_error"], "Calibration error, %: lower is better"
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
                            ["fedfisher/upload_bytes"],
                            "Bytes sent, once: near those of the weights?",
                        ),
                        _values(
                            ["server_seconds"],
                            "Seconds of the merge: how it grows with clients",
                        ),
                    ],
                ),
                (
                    8,
                    [
                        _values(
                            ["fedfisher/extraction_seconds"],
                            "Seconds of extraction: short beside the training?",
                        ),
                        _values(
                            ["fedfisher/curvature_samples"],
                            "Samples behind the curvature: few make it noisy",
                        ),
                    ],
                ),
            ],
        ),
    ]


_LOSS = "^(?:(?:train|training|val|valid|validation)[_/])?loss(?:_epoch)?$"


def _client(key: str) -> str:
    """Matches what clients log, of one callback or of several side by side."""
    return f"^fedfisher/(?:[^/]+/)?{key}$"


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


def _spectrum() -> Any:
    fields = {name: name for name in ("step", "lineKey", "lineVal")}
    title = "Eigenvalues of the curvature: steep where few directions matter"
    words = {"title": title, "xname": "rank, as a share of all"}
    return _chart("fedfisher/spectrum", "wandb/lineseries/v0", fields, words)


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
