"""The panels of a federation's W&B dashboards, grouped by the question that they answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import wandb_workspaces.reports.v2 as wr

from lightning_fedfisher.merge.influence_cap import DEFAULT_MAX_INFLUENCE
from lightning_fedfisher.tracking import logged_keys as keys

MOST_RUNS = 100
"""The most runs that a panel shows; W&B's own limit of 10 would hide clients."""

_COLUMNS = 24  # of a report's grid


class Section(NamedTuple):
    """Panels that answer one question.

    Attributes:
        title: The question.
        text: What to look for in the panels. W&B's tables have no title that could say it.
        rows: Rows of panels, each with its height in cells; its panels share the grid's width.
    """

    title: str
    text: str
    rows: Sequence[tuple[int, Sequence[Any]]]

    def panels(self, *above: tuple[int, Sequence[Any]]) -> list[Any]:
        """Gives every panel its place on the grid, row by row.

        Args:
            *above: Further rows, each with its height, above the section's own.

        Returns:
            The panels, from the top left to the bottom right.
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
    """Makes the sections of a dashboard, with new panels at every call.

    Returns:
        One section for each question, from the data to the costs.
    """
    return [
        Section(
            "Who holds what",
            "How unlike the clients' data are. A client that holds few classes learns nothing of "
            "the others, and the plain average of such models is poor. The table, where a "
            "simulation may know it, counts samples by client and class.",
            [
                (
                    8,
                    [
                        _bars(
                            keys.DATA_CLASSES,
                            "class",
                            "samples",
                            "Few classes: a one-sided client",
                        )
                    ],
                ),
                (8, [wr.WeavePanelSummaryTable(table_name=keys.PARTITION)]),
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
                            keys.LOSS_PATTERN,
                            "Loss by epoch: every client levels off",
                            x=keys.EPOCH,
                            log=True,
                        ),
                        _values(
                            [keys.TEST_ACCURACY],
                            "Accuracy by run: is a merge above every client?",
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
                            keys.of_each_layer_of_clients(keys.TRACE),
                            "Trace by layer: no client should tower over the others",
                            log=True,
                        ),
                        _lines(
                            keys.of_each_layer_of_clients(keys.EFFECTIVE_RANK),
                            "Effective rank by layer: low where few directions matter",
                            log=True,
                        ),
                    ],
                ),
                (8, [wr.WeavePanelSummaryTable(table_name=_of_client(keys.CURVATURE))]),
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
                            keys.exactly(keys.OBJECTIVE),
                            "Objective: falls, then stays",
                            x=keys.ITERATIONS,
                            log=True,
                        ),
                        _lines(
                            keys.exactly(keys.RESIDUAL),
                            "Residual: ends low if it converged",
                            x=keys.ITERATIONS,
                            log=True,
                        ),
                        _lines(
                            keys.exactly(keys.ITERATIONS),
                            "Iterations: levels off when all are done",
                        ),
                    ],
                ),
                (
                    8,
                    [
                        _lines(
                            keys.of_each(keys.RESIDUAL),
                            "Residual by layer: is one not solved?",
                            log=True,
                        ),
                        _lines(
                            keys.of_each(keys.DISTANCE),
                            "Distance by client: the farthest was outvoted",
                        ),
                        _lines(
                            keys.of_each(keys.INFLUENCE),
                            f"Influence by client: look at those above {DEFAULT_MAX_INFLUENCE:g}",
                            log=True,
                        ),
                    ],
                ),
                (8, [wr.WeavePanelSummaryTable(table_name=keys.CLIENTS)]),
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
                            keys.ACCURACY,
                            "model",
                            "accuracy, %",
                            "Accuracy: is the merge above the best client?",
                        )
                    ],
                ),
                (8, [wr.WeavePanelSummaryTable(table_name=keys.COMPARISON)]),
                (
                    11,
                    [
                        _confusion(
                            keys.CONFUSION_BEFORE,
                            "Best client: which classes does it never name?",
                        ),
                        _confusion(keys.CONFUSION_AFTER, "Merged: is the diagonal filled?"),
                    ],
                ),
                (
                    8,
                    [
                        _values([keys.TEST_ACCURACY], "Accuracy, %: higher is better"),
                        _values([keys.TEST_NLL], "Negative log-likelihood: lower is better"),
                        _values(
                            [keys.TEST_CALIBRATION_ERROR],
                            "Calibration error, %: lower is better",
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
                            [_of_client(keys.UPLOAD_BYTES)],
                            "Bytes sent, once: near those of the weights?",
                        ),
                        _values(
                            [keys.SERVER_SECONDS],
                            "Seconds of the merge: how it grows with clients",
                        ),
                    ],
                ),
                (
                    8,
                    [
                        _values(
                            [_of_client(keys.EXTRACTION_SECONDS)],
                            "Seconds of extraction: short beside the training?",
                        ),
                        _values(
                            [_of_client(keys.CURVATURE_SAMPLES)],
                            "Samples behind the curvature: few make it noisy",
                        ),
                    ],
                ),
            ],
        ),
    ]


def _of_client(name: str) -> str:
    """Makes the key of a client with one callback."""
    return keys.join(keys.CLIENT_PREFIX, name)


def _lines(pattern: str, title: str, x: str = keys.GLOBAL_STEP, log: bool = False) -> Any:
    """Makes a line plot of every key that a pattern matches."""
    # Never aggregated: grouped runs would make one line of all clients.
    return wr.LinePlot(
        title=title,
        x=x,
        metric_regex=pattern,
        log_y=log,
        aggregate=False,
        max_runs_to_show=MOST_RUNS,
    )


def _values(names: Sequence[str], title: str) -> Any:
    """Makes a bar plot of the last value of some keys, one bar for each run."""
    return wr.BarPlot(
        title=title,
        metrics=list(names),
        aggregate=False,
        max_runs_to_show=MOST_RUNS,
        max_bars_to_show=MOST_RUNS,
    )


def _bars(key: str, label: str, value: str, title: str) -> Any:
    """Makes the panel of a bar chart that was logged under a key."""
    return _chart(key, "wandb/bar/v0", {"label": label, "value": value}, {"title": title})


def _spectrum() -> Any:
    """Makes the panel of the clients' eigenvalues."""
    fields = {name: name for name in ("step", "lineKey", "lineVal")}
    title = "Eigenvalues of the curvature: steep where few directions matter"
    words = {"title": title, "xname": "rank, as a share of all"}
    return _chart(_of_client(keys.SPECTRUM), "wandb/lineseries/v0", fields, words)


def _confusion(key: str, title: str) -> Any:
    """Makes the panel of a confusion matrix that was logged under a key."""
    fields = {name: name for name in ("Actual", "Predicted", "nPredictions")}
    return _chart(key, "wandb/confusion_matrix/v1", fields, {"title": title})


def _chart(key: str, kind: str, fields: Mapping[str, str], words: Mapping[str, str]) -> Any:
    """Makes the panel of a custom chart that was logged under a key, as W&B itself draws it."""
    asked: dict[str, Any] = dict.fromkeys(("id", "name", "_defaultColorIndex"))
    return wr.CustomChart(
        query={**asked, "summaryTable": {"tableKey": f"{key}_table"}},
        chart_name=kind,
        chart_fields=dict(fields),
        chart_strings=dict(words),
    )
