"""The report of a federation: one HTML file with its numbers, charts and scripts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from lightning_fedfisher._utils.environment import package_version
from lightning_fedfisher._utils.files import atomic_write
from lightning_fedfisher._utils.text import page_text
from lightning_fedfisher.report.charts.registry import accuracy_finding, charts
from lightning_fedfisher.report.wording import count, is_known, label, number
from lightning_fedfisher.results.record import FederationRecord, MergeRecord, ModelScore

FILE_NAME = "report.html"
"""The name of a report's file in the folder of a federation."""

_NONE = "–"  # noqa: RUF001


def write_report(record: FederationRecord, path: str | os.PathLike[str]) -> None:
    """Writes the report of a federation: one HTML page that needs no network and no other file.

    Args:
        record: The record of the federation, as `FederationRecord.load` reads it.
        path: The HTML file to write; a reader sees the old file or the whole new one.

    Raises:
        OSError: If the file cannot be written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> record = FederationRecord("two clinics", clients=[], merges=[])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = Path(folder, "report.html")
        ...     write_report(record, page)
        ...     "two clinics" in page.read_text()
        True
    """
    drawn, (columns, rows) = charts(record), _table(record)
    page = _environment().get_template("report.html.j2")
    text = page.render(
        title=page_text(record.title),
        about=_about(record),
        finding=accuracy_finding(record),
        facts=_facts(record),
        columns=columns,
        about_table=_ABOUT_TABLE if len(rows) > 1 else "What it cost, and what it is good for.",
        rows=rows,
        charts=drawn,
        figures=[[panel.figure.to_plotly_json() for panel in chart.panels] for chart in drawn],
        settings=[
            (heading, [(page_text(str(name)), _written(value)) for name, value in table.items()])
            for heading, table in (
                ("Configuration", record.config),
                ("Environment", record.environment),
            )
            if table
        ],
        version=package_version(),
        plotly=get_plotlyjs() if drawn else "",
    )
    with atomic_write(Path(path)) as partial:
        # JSON may hold lone surrogates, which UTF-8 cannot encode.
        partial.write_text(text, encoding="utf-8", errors="replace")


def _environment() -> Environment:
    """Makes jinja2's environment for the template, which escapes everything it is given."""
    made = Environment(
        loader=PackageLoader("lightning_fedfisher.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return made


class _Fact(NamedTuple):
    """A number that is shown large above the table."""

    name: str
    value: str
    note: str


def _facts(record: FederationRecord) -> list[_Fact]:
    """Collects the numbers above the table, of the first merge."""
    facts = []
    merge = record.merges[0] if record.merges else None
    score = merge.score if merge else None
    best, ensemble = _of(record.best_client, "accuracy"), _of(record.ensemble, "accuracy")
    beside = [
        f"{name} {value:.1f}%"
        for name, value in (("best client", best), ("ensemble", ensemble))
        if is_known(value)
    ]
    accuracy = _of(score, "accuracy")
    if is_known(accuracy):
        facts.append(_Fact("Test accuracy", f"{accuracy:.1f}%", ", ".join(beside)))
    elif beside:
        facts.append(_Fact("Test accuracy", _NONE, ", ".join(beside)))
    if merge is None:
        return facts
    if merge.upload_bytes is not None:
        times = _uploads(merge)
        size = f"{_size(merge.upload_bytes)} a client, once"
        if is_known(times) and merge.fedavg_bytes:
            size += f"; FedAvg {_size(merge.fedavg_bytes)} every round"
            facts.append(_Fact("Upload, of FedAvg's", f"{times:.2f}×", size))  # noqa: RUF001
        else:
            facts.append(_Fact("Upload", _size(merge.upload_bytes), "a client, once"))
    seconds = [(merge.server_seconds, "server"), (merge.client_seconds, "each client")]
    known = [f"{_seconds(value)} s {where}" for value, where in seconds if is_known(value)]
    if known:
        amount, _, where = known[0].partition(" s ")
        rest = f", {known[1]}" if len(known) > 1 else ""
        facts.append(_Fact("Time beside training", f"{amount} s", f"{where}{rest}"))
    note = "labelled samples" if merge.server_labels else "the server needs no data"
    if merge.unlabelled_samples:
        note = f"beside {count(merge.unlabelled_samples, 'unlabelled sample')}"
    facts.append(_Fact("Labels on the server", f"{merge.server_labels:,}", note))
    return facts


def _about(record: FederationRecord) -> str:
    """Counts clients, samples and methods, for the line below the title."""
    samples = sum(client.num_samples for client in record.clients)
    parts = [
        count(len(record.clients), "client"),
        count(samples, "training sample"),
        count(len(record.merges), "merge method"),
    ]
    return ", ".join(parts)


@dataclass(frozen=True)
class _Column:
    """A column of the table: what it shows, and whether larger (1) or smaller (-1) is better."""

    title: str
    value: Callable[[MergeRecord], float | None]
    shown: Callable[[float], str]
    sign: int = -1


_ABOUT_TABLE = "Test scores and costs. ★ marks the best method of a column, where they differ."


class _Cell(NamedTuple):
    """A cell of the table."""

    text: str
    best: bool


class _Row(NamedTuple):
    """A row of the table; references are no methods and are not compared."""

    name: str
    full: str
    cells: list[_Cell]
    reference: bool


def _of(score: ModelScore | None, what: str) -> float | None:
    """Reads a field of a score; None if there is no score or the field is not finite."""
    value = getattr(score, what) if score else None
    return value if is_known(value) else None


def _uploads(merge: MergeRecord) -> float | None:
    """Divides the upload by FedAvg's; None if one of them is not known."""
    if merge.upload_bytes is None or not merge.fedavg_bytes:
        return None
    return merge.upload_bytes / merge.fedavg_bytes


def _seconds(value: float) -> str:
    """Writes seconds with as many decimals as matter."""
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


_SCORES = (
    _Column("Accuracy, %", lambda own: _of(own.score, "accuracy"), "{:.1f}".format, 1),
    _Column("NLL, nats", lambda own: _of(own.score, "nll"), "{:.3f}".format),
    _Column(
        "Calibration error, %", lambda own: _of(own.score, "calibration_error"), "{:.1f}".format
    ),
)
_COLUMNS = (
    *_SCORES,
    _Column("Upload, × FedAvg", _uploads, "{:.2f}".format),  # noqa: RUF001
    _Column("Client, s", lambda own: own.client_seconds, _seconds),
    _Column("Server, s", lambda own: own.server_seconds, _seconds),
    _Column("Labels", lambda own: own.server_labels, "{:,.0f}".format),
    _Column("Unlabelled", lambda own: own.unlabelled_samples or None, "{:,.0f}".format),
)


def _table(record: FederationRecord) -> tuple[list[str], list[_Row]]:
    """Makes the titles and rows, without the columns of which no row has a value."""
    references = [
        (name, MergeRecord("", [], score=score))
        for name, score in (
            ("best single client", record.best_client),
            ("ensemble", record.ensemble),
        )
        if score
    ]
    every = [*record.merges, *(alone for _, alone in references)]
    known = [c for c in _COLUMNS if any(is_known(c.value(merge)) for merge in every)]
    columns = [_cells(column, record.merges) for column in known]
    rows = [
        _Row(label(merge.method, 30), page_text(merge.method), list(cells), False)
        for merge, *cells in zip(record.merges, *columns, strict=True)
    ]
    for name, alone in references:
        # A reference sends no model, merges none and uses no labels.
        cells = [
            _cells(column, [alone])[0] if column in _SCORES else _Cell(_NONE, False)
            for column in known
        ]
        rows.append(_Row(name, name, cells, True))
    return [column.title for column in known], rows


def _cells(column: _Column, merges: Sequence[MergeRecord]) -> list[_Cell]:
    """Makes the cells of a column and marks the best of them."""
    values = [column.value(merge) for merge in merges]
    known = [value for value in values if is_known(value)]
    texts = [column.shown(value) if is_known(value) else _NONE for value in values]
    if not known:
        return [_Cell(text, False) for text in texts]
    best = column.shown(column.sign * max(column.sign * value for value in known))
    # None is best if all read alike; those that read like the best are best as well.
    differ = len({text for text in texts if text != _NONE}) > 1
    return [_Cell(text, differ and text == best) for text in texts]


def _size(size: float) -> str:
    """Writes a number of bytes with its unit."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{number(size / unit)} {name}"
    return count(round(size), "byte")


def _written(value: Any) -> str:
    """Writes a setting's value: text as it is, anything else as JSON."""
    return page_text(value if isinstance(value, str) else json.dumps(value, default=str))
