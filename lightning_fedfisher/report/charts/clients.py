"""Charts of the clients: what they hold, how they trained, what their curvature says."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import plotly.graph_objects as go

from lightning_fedfisher.curvature.summary import CurvatureSummary
from lightning_fedfisher.report.charts.plots import (
    Series,
    bar,
    heat,
    lines,
    strip,
)
from lightning_fedfisher.report.charts.style import (
    MOST_ROWS,
    MOST_SERIES,
    Chart,
    Panel,
    figure,
    log_axis,
    round_step,
)
from lightning_fedfisher.report.wording import (
    count,
    is_drawn,
    is_known,
    label,
    labels,
    marked,
    number,
    percent,
    sentences,
)
from lightning_fedfisher.results.record import ClientRecord, FederationRecord

_MOST_COLUMNS, _MOST_PRINTED = 100, 12


def data_chart(record: FederationRecord) -> Chart | None:
    """Draws how many samples of each class each client holds.

    Args:
        record: The record of the federation.

    Returns:
        The chart; None if no client has told how many samples of each class it holds.
    """
    telling = [client for client in record.clients if sum(client.class_counts)]
    if not telling:
        return None
    classes = max(len(client.class_counts) for client in telling)
    shown = telling
    if len(telling) > MOST_ROWS:
        least = sorted((sum(client.class_counts) for client in telling), reverse=True)[MOST_ROWS]
        above = [client for client in telling if sum(client.class_counts) > least]
        ties = [client for client in telling if sum(client.class_counts) == least]
        chosen = {id(client) for client in [*above, *ties][:MOST_ROWS]}
        shown = [client for client in telling if id(client) in chosen]
    group = math.ceil(classes / _MOST_COLUMNS)
    held = [
        [sum(client.class_counts[at : at + group]) for at in range(0, classes, group)]
        for client in shown
    ]
    printed = len(held[0]) <= _MOST_PRINTED
    names = [f"class {c}" if group == 1 else f"classes {c} to {min(c + group, classes) - 1}"
             for c in range(0, classes, group)]  # fmt: skip
    traces = heat(
        held,
        max(map(max, held)),
        [[_compact(amount) for amount in row] for row in held] if printed else [],
        True,
        ygap=1,
        hoverinfo="text",
        hovertext=[
            [
                f"{marked(client.name)}<br>{name}: {amount:,}"
                for name, amount in zip(names, row, strict=True)
            ]
            for client, row in zip(shown, held, strict=True)
        ],
        colorbar=bar(),
    )
    step = max(group, round_step(classes))
    x = {
        "title": "class",
        "tickvals": [tick / group for tick in range(0, classes, step)],
        "ticktext": [str(tick) for tick in range(0, classes, step)],
    }
    y = {
        "autorange": "reversed",
        "tickvals": list(range(len(shown))),
        "ticktext": [marked(name) for name in labels([own.name for own in shown], 12)],
    }
    height = 70 + max(26 * len(shown), 80) + (0 if printed else 50)
    silent = len(record.clients) - len(telling)
    drawn = "Samples of each class that each client holds; empty where it holds none"
    if len(shown) < len(telling):
        drawn = f"Samples of each class at the {len(shown)} largest of {len(telling):,} clients"
    return Chart(
        "data",
        _data_title(record, telling, classes),
        sentences(
            drawn,
            f"Classes are added up in groups of {group}" if group > 1 else "",
            f"{count(silent, 'client')} that tell no classes left out" if silent else "",
        ),
        [Panel(figure(traces, height, x, y))],
    )


def _data_title(record: FederationRecord, telling: Sequence[ClientRecord], classes: int) -> str:
    """Says who holds most samples, or how many classes each client holds."""
    kinds = [sum(amount > 0 for amount in client.class_counts) for client in telling]
    sizes = {sum(client.class_counts) for client in telling}
    of_classes = f"of {count(classes, 'class', 'classes')}"
    if len(record.clients) == 1:
        only = telling[0]
        return f"{label(only.name, 40)} holds all samples, and {kinds[0]} {of_classes}"
    if len(sizes) == 1 and len(telling) == len(record.clients):
        size = f"All {len(telling):,} clients hold {count(sizes.pop(), 'sample')}"
        if len(set(kinds)) == 1:
            return f"{size} and {kinds[0]} {of_classes} each"
        least = kinds.index(min(kinds))
        name = label(telling[least].name, 40)
        return f"{size} each, {name} of {kinds[least]} {of_classes} only"
    total = sum(sum(client.class_counts) for client in telling)
    most = max(range(len(telling)), key=lambda at: sum(telling[at].class_counts))
    share = percent(sum(telling[most].class_counts), total)
    name = label(telling[most].name, 40)
    among = "" if len(telling) == len(record.clients) else " that are told by class"
    return f"{name} holds {share} of the samples{among} and {kinds[most]} {of_classes}"


def loss_chart(record: FederationRecord) -> Chart | None:
    """Draws each client's training loss by epoch.

    Args:
        record: The record of the federation.

    Returns:
        The chart; None if no client has a finite one.
    """
    trained = [client for client in record.clients if client.train_loss]
    series = []
    for client in trained:
        kept = [(e, loss) for e, loss in enumerate(client.train_loss, 1) if is_known(loss)]
        if kept:
            series.append(Series(client.name, [e for e, _ in kept], [loss for _, loss in kept]))
    if not series:
        return None
    epochs = max(len(client.train_loss) for client in trained)
    step = round_step(epochs)
    ticks = list(range(1, epochs + 1)) if step == 1 else [1, *range(step, epochs + 1, step)]
    x = {"title": "epoch", "tickvals": ticks, "range": [0.7, epochs + 0.3]}
    y = {"title": "training loss", "rangemode": "tozero"}
    many = len(series) > MOST_SERIES
    drawn = "Mean training loss after each epoch on the client's own data"
    lost = len(trained) - len(series)
    return Chart(
        "loss",
        _loss_title(trained),
        sentences(
            f"{drawn}: all {len(series):,} clients, and where it ends highest and lowest"
            if many
            else drawn,
            f"{count(lost, 'client')} without a finite loss left out" if lost else "",
        ),
        [Panel(lines(series, x, y, "epoch %{x}: %{y:.3~g}"))],
    )


def _loss_title(trained: Sequence[ClientRecord]) -> str:
    """Says where the training losses end, or that one is not finite."""
    broken = [client for client in trained if not is_known(client.train_loss[-1])]
    if broken:
        where = f"{len(broken):,} of {len(trained):,} clients"
        where = label(broken[0].name, 40) if len(broken) == 1 else where
        return f"Training loss is not finite in the end at {where}"
    ends = [client.train_loss[-1] for client in trained]
    low, high = number(min(ends)), number(max(ends))
    fell = sum(client.train_loss[-1] < client.train_loss[0] for client in trained)
    if len(trained) == 1:
        name, first = label(trained[0].name, 40), trained[0].train_loss[0]
        if len(trained[0].train_loss) == 1 or not is_known(first):
            return f"The training loss of {name} ends at {low}"
        how = "fell" if fell else "rose" if ends[0] > first else "went"
        return f"The training loss of {name} {how} from {number(first)} to {low}"
    at = f"at {low}" if low == high else f"between {low} and {high}"
    if all(len(client.train_loss) == 1 for client in trained):
        return f"After one epoch the training loss of {len(trained):,} clients is {at}"
    who = f"all {len(trained):,}" if fell == len(trained) else f"{fell:,} of {len(trained):,}"
    return f"Training loss fell at {who} clients and ended {at}"


def curvature_chart(record: FederationRecord) -> Chart | None:
    """Draws the trace of the curvature by layer and client, and the spectrum of the largest.

    Args:
        record: The record of the federation.

    Returns:
        The chart; None if no client has a layer with a positive and finite trace.
    """
    tables = [{layer.layer: layer for layer in client.curvature} for client in record.clients]
    names = list(dict.fromkeys(name for table in tables for name in table))
    positive = {
        name: [t[name].trace for t in tables if name in t and is_drawn(t[name].trace)]
        for name in names
    }
    top = max((trace for traces in positive.values() for trace in traces), default=0.0)
    if not top:
        return None
    weights = {name: math.fsum(t / top for t in traces) for name, traces in positive.items()}
    ranked = sorted(names, key=lambda name: -weights[name])
    chosen = set(ranked[:MOST_ROWS])
    rows = [name for name in names if name in chosen]
    sending = [index for index, table in enumerate(tables) if table]
    clients = [record.clients[index].name for index in sending]
    values = [
        [tables[i][name].trace if name in tables[i] else math.nan for i in sending] for name in rows
    ]
    totals = [math.fsum(row[at] / top for row in values if is_drawn(row[at]))
              for at in range(len(sending))]  # fmt: skip
    notable = totals.index(max(totals))
    missing = sum(
        not is_drawn(layer.trace) for client in record.clients for layer in client.curvature
    )
    steepest = ranked[0]
    panels = [Panel(strip(rows, clients, values, "trace", notable), "Trace of each layer")]
    layers = [table[steepest] for table in tables if steepest in table]
    pairs = zip(record.clients, tables, strict=True)
    holders = [client for client, table in pairs if steepest in table]
    if spectra := _spectra(holders, layers):
        beside = _spectrum(spectra, panels[0].figure.layout.height)
        panels.append(Panel(beside, f"Spectrum of {label(steepest, 40)}"))
    ranks = [layer.effective_rank for layer in layers if is_drawn(layer.effective_rank)]
    share = percent(weights[steepest], math.fsum(weights.values()))
    spread = ""
    if ranks:
        middle = round(statistics.median(ranks))
        spread = f", spread over about {count(middle, 'direction')}"
    few = f", of the {len(rows)} of {len(names)} layers where that is most"
    return Chart(
        "curvature",
        f"{label(steepest, 40)} has {share} of the curvature{spread}",
        sentences(
            "How much a client's loss minds a change of a layer"
            + (few if len(rows) < len(names) else ""),
            "Directions are the median client's effective rank" if ranks else "",
            "The heaviest client is drawn by itself" if len(sending) > MOST_SERIES else "",
            f"{count(missing, 'trace')} not positive and finite left out" if missing else "",
        ),
        panels,
    )


def _spectra(clients: Sequence[ClientRecord], layers: Sequence[CurvatureSummary]) -> list[Series]:
    """Collects each client's eigenvalues of a layer, relative to the largest, by their rank."""
    found = []
    for client, layer in zip(clients, layers, strict=True):
        top = layer.spectrum[0] if layer.spectrum else 0.0
        if len(layer.spectrum) > 1 and is_drawn(top):
            last = len(layer.spectrum) - 1
            # Eigenvalues below float32's rounding are noise.
            kept = [(100 * rank / last, v / top) for rank, v in enumerate(layer.spectrum)
                    if is_drawn(v) and v / top > 1e-8]  # fmt: skip
            found.append(Series(client.name, [x for x, _ in kept], [y for _, y in kept]))
    return found


def _spectrum(spectra: Sequence[Series], height: int) -> go.Figure:
    """Draws the clients' eigenvalues of a layer on a logarithmic axis."""
    y = log_axis([v for own in spectra for v in own.y], "eigenvalue, of the largest", upright=True)
    x = {"title": "rank, % of all eigenvalues", "range": [-3, 103]}
    return lines(spectra, x, y, "rank %{x:.0f}%: %{y:.2~g} of the largest", height)


def _compact(amount: int) -> str:
    """Writes an amount in four characters at most; nothing for zero."""
    if amount < 1000:
        return str(amount or "")
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if amount >= unit:
            return f"{amount / unit:.{1 if amount < 10 * unit else 0}f}{name}"
    raise AssertionError(amount)
