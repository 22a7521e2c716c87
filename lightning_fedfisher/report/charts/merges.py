"""Charts of the merges: how they converged, and which clients decided."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain

from lightning_fedfisher.report.charts.plots import (
    Series,
    lines,
    strip,
)
from lightning_fedfisher.report.charts.style import (
    MOST_ROWS,
    MOST_SERIES,
    Chart,
    Panel,
    log_axis,
)
from lightning_fedfisher.report.wording import (
    count,
    is_drawn,
    label,
    number,
    percent,
    sentences,
)
from lightning_fedfisher.results.record import FederationRecord, MergeRecord

_LEAST_RESIDUAL = 1e-8  # smaller ones are below float32's rounding


def convergence_chart(record: FederationRecord) -> Chart | None:
    """Draws how the residual of each iterative method falls, once all its layers have begun.

    Args:
        record: The record of the federation.

    Returns:
        The chart; None if no method has two residuals to show.
    """
    curves = []
    for merge in record.merges:
        if len(merge.history) < 2:
            continue
        points = [(e.get("iterations", 0.0), e.get("residual", math.inf)) for e in merge.history]
        held = [(step, r) for step, r in points if step >= 1 and 0 <= r < math.inf]
        # A method that aligns begins layer after layer; its residual is 1 until the last has begun.
        held = [(step, r) for step, r in held if r < 1] or held
        if held:
            curves.append((merge.method, points[-1], held))
    if not any(len(held) > 1 for _, _, held in curves):
        return None
    shown = curves[:MOST_SERIES]
    series = [
        Series(name, [step for step, _ in held], [max(r, _LEAST_RESIDUAL) for _, r in held])
        for name, _, held in shown
    ]
    floored = any(r < _LEAST_RESIDUAL for _, _, held in shown for _, r in held)
    x = log_axis([step for own in series for step in own.x], "solver iterations")
    y = log_axis([r for own in series for r in own.y], "relative residual", upright=True)
    most = f"the first {len(shown)} of {len(curves)} iterative methods"
    return Chart(
        "convergence",
        _convergence_title([(name, end) for name, end, _ in curves]),
        sentences(
            "Largest relative residual of a layer after so many solver iterations, of "
            + (most if len(shown) < len(curves) else "each iterative method"),
            "An epoch is left out while a layer waits to begin",
            f"Less than {number(_LEAST_RESIDUAL)} is drawn there" if floored else "",
        ),
        [Panel(lines(series, x, y, "%{x:,.0f} iterations: residual %{y:.2~g}"))],
    )


def _convergence_title(ends: Sequence[tuple[str, tuple[float, float]]]) -> str:
    """Says with which residuals the methods end."""
    finite = [(name, steps, r) for name, (steps, r) in ends if 0 <= r < math.inf]
    broken = [name for name, (_, r) in ends if not 0 <= r < math.inf]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        verb = "end" if more else "ends"
        return f"{label(broken[0], 40)}{more} {verb} without a finite residual"
    best, steps, low = min(finite, key=lambda own: own[2])
    worst, _, high = max(finite, key=lambda own: own[2])
    if len(finite) > 1 and number(low) == number(high):
        return f"All {len(finite)} iterative methods end with a residual of {number(low)}"
    told = f"{label(best, 40)} ends with a residual of {number(low)}"
    told += f" after {count(round(steps), 'iteration')}"
    return told if len(finite) == 1 else f"{told}, {label(worst, 40)} with {number(high)}"


def weight_chart(record: FederationRecord) -> Chart | None:
    """Draws how far each client is from the first merge, and how much it decides, by layer.

    Args:
        record: The record of the federation.

    Returns:
        The chart; None if there is only one client, or neither number is known for every client.
    """
    if not record.merges or len(record.clients) < 2:
        return None
    merge, clients = record.merges[0], [client.name for client in record.clients]
    panels, findings, notes = [], [], []
    influence = _whole(merge.influence, merge, clients)
    distances = _whole(merge.distances, merge, clients)
    for values, name, title in (
        (distances, "Distance from the merge", "distance, Fisher norm"),
        (influence, "Influence", "times the median client's"),
    ):
        if not any(map(is_drawn, chain(*values))):
            continue
        rows = _heaviest(influence or distances)
        if values is influence:
            notable = max(range(len(clients)), key=lambda at: _largest(row[at] for row in values))
        else:
            sums = _sums(values)
            notable = sums.index(max(sums))
        picked = strip(
            [merge.layers[row] for row in rows],
            clients,
            [values[row] for row in rows],
            title,
            notable,
            1.0 if values is influence else None,
        )
        panels.append(Panel(picked, name))
    if not panels:
        return None
    if influence:
        findings.append(_influence_finding(merge, clients, influence))
    if distances:
        findings.append(_distance_finding(merge, clients, distances))
    hidden = sum(not is_drawn(v) for v in chain(*influence, *distances))
    if len(merge.layers) > MOST_ROWS:
        notes.append(f"{MOST_ROWS} of {len(merge.layers)} layers, where a client weighs most")
    if len(clients) > MOST_SERIES:
        notes.append("The client that stands out is drawn by itself")
    if hidden:
        notes.append(f"{count(hidden, 'value')} zero or infinite left out")
    return Chart(
        "clients",
        "; ".join(filter(None, findings)),
        sentences(
            f"How far the merge by {label(merge.method, 40)} is from each client, in its Fisher "
            "norm, and how much the client decides, by layer",
            *notes,
        ),
        panels,
    )


def _whole(
    values: list[list[float]], merge: MergeRecord, clients: Sequence[str]
) -> list[list[float]]:
    """Returns the values if there is one for each layer and client, else nothing."""
    fits = len(values) == len(merge.layers) and all(len(row) == len(clients) for row in values)
    return values if fits else []


def _sums(values: Sequence[Sequence[float]]) -> list[float]:
    """Sums each client's squares over the layers, relative to the square of the largest value."""
    top = max(filter(is_drawn, chain(*values)))
    columns = zip(*values, strict=True)
    return [sum((v / top) ** 2 for v in own if is_drawn(v)) for own in columns]


def _largest(values: Iterable[float]) -> float:
    """Finds the largest value that is a number; 0 if there is none."""
    return max((v for v in values if not math.isnan(v)), default=0.0)


def _heaviest(values: Sequence[Sequence[float]]) -> list[int]:
    """Finds the rows with the largest values, and keeps them in their order."""
    most = [_largest(row) for row in values]
    return sorted(sorted(range(len(values)), key=lambda row: -most[row])[:MOST_ROWS])


def _influence_finding(
    merge: MergeRecord, clients: Sequence[str], influence: Sequence[Sequence[float]]
) -> str:
    """Says which client weighs most, and in which layer."""
    found = [(v, at, row) for row, own in enumerate(influence) for at, v in enumerate(own)]
    known = [own for own in found if not math.isnan(own[0])]
    if not known:
        return ""
    most, at, row = max(known, key=lambda own: own[0])
    if most <= 2:
        return f"No client weighs more than {number(most)} times the median client"
    times = "infinitely more than" if most == math.inf else f"{number(most)} times as much as"
    where = label(merge.layers[row], 40)
    return f"{label(clients[at], 40)} weighs up to {times} the median client, in {where}"


def _distance_finding(
    merge: MergeRecord, clients: Sequence[str], distances: Sequence[Sequence[float]]
) -> str:
    """Says from which client the merge is farthest."""
    for own, name in zip(distances, merge.layers, strict=True):
        if math.inf in own:
            who = label(clients[own.index(math.inf)], 30)
            return f"{who} is infinitely far from the merge in {label(name, 40)}"
    if not any(map(is_drawn, chain(*distances))):
        return ""
    sums = _sums(distances)
    far = sums.index(max(sums))
    share = percent(sums[far], math.fsum(sums))
    return f"{share} of the squared distance from the merge is {label(clients[far], 40)}'s"
