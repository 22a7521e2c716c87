"""Markdown tables of the studies: a row a setting, a column a group of federations."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from simulation.tables.grouping import FederationKey, by_federation, columns_of, short_name
from simulation.tables.markdown import markdown, rule, spread


def study_table(rows: Sequence[dict[str, str]]) -> str:
    """Shows merged accuracy by what the clients extracted: a column for each key.

    Args:
        rows: of a curvature study, from `read_rows`; all federations for every setting.

    Returns:
        A Markdown table of test accuracies in percent, negative log-likelihoods and upload sizes.
    """
    federations = list(dict.fromkeys(short_name(row) for row in rows))
    settings = list(dict.fromkeys(_setting(row) for row in rows))
    found = {(_setting(row), short_name(row)): row for row in rows}
    table = [
        ["curvature", "Fisher", "samples", *federations, "mean", "NLL", "upload"],
        rule(len(federations) + 6, left=2),
    ]
    for setting in settings:
        here = [found[setting, key] for key in federations]
        accuracies = [float(row["accuracy"]) for row in here]
        nll = statistics.mean(float(row["nll"]) for row in here)
        sizes = [float(row["upload_bytes"]) / float(row["fedavg_bytes"]) for row in here]
        low, high = f"{min(sizes):.1f}", f"{max(sizes):.1f}"
        table.append(
            [
                *setting,
                *(f"{accuracy:.1f}" for accuracy in accuracies),
                f"{statistics.mean(accuracies):.2f}",
                f"{nll:.2f}",
                low if low == high else f"{low}-{high}",
            ]
        )
    return markdown(table)


def positions_table(rows: Sequence[dict[str, str]]) -> str:
    """Shows merged accuracy by the positions that factors are computed from, and by what is sent.

    Args:
        rows: of a positions study, from `read_rows`; all federations for every setting.

    Returns:
        A Markdown table of test accuracies in percent (mean, lowest and highest over federations),
        of their change against all positions as they are, and of negative log-likelihoods.
    """
    settings = list(dict.fromkeys((row["positions"], row["sent"]) for row in rows))
    by_setting = {
        setting: [row for row in rows if (row["positions"], row["sent"]) == setting]
        for setting in settings
    }
    first = [float(row["accuracy"]) for row in by_setting[settings[0]]]
    columns = ["positions", "sent", "accuracy", "change", "least change", "NLL", "extraction, s"]
    table = [columns, rule(len(columns), left=2)]
    for setting, here in by_setting.items():
        accuracies = [float(row["accuracy"]) for row in here]
        changes = [now - before for now, before in zip(accuracies, first, strict=True)]
        table.append(
            [
                *setting,
                spread(accuracies),
                f"{statistics.mean(changes):+.2f}",
                f"{min(changes):+.2f}",
                f"{statistics.mean(float(row['nll']) for row in here):.2f}",
                f"{statistics.mean(float(row['extraction_seconds']) for row in here):.2f}",
            ]
        )
    return markdown(table)


def merge_table(rows: Sequence[dict[str, str]]) -> str:
    """Shows the accuracy of every merge method, by network and, for LeNet, by alpha.

    Args:
        rows: of a merge study, from `read_rows`; all federations for every method.

    Returns:
        A Markdown table of test accuracies in percent (mean, lowest and highest over federations)
        and of the mean negative log-likelihood in nats.
    """
    found = by_federation(rows, "method")
    columns = columns_of(rows)
    federations = [key for group in columns.values() for key in group]
    lenet = [key for key in federations if key.model == "lenet"]
    titles = ["method", "server labels", *columns, *(["lenet mean"] if lenet else []), "NLL"]
    table = [titles, rule(len(titles))]
    for method, own in found.items():
        accuracies = {key: float(own[key]["accuracy"]) for key in federations}
        table.append(
            [
                method,
                str(max(int(own[key]["server_labels"]) for key in federations)),
                *(spread([accuracies[key] for key in group]) for group in columns.values()),
                *([f"{statistics.mean(accuracies[key] for key in lenet):.2f}"] if lenet else []),
                f"{statistics.mean(float(own[key]['nll']) for key in federations):.2f}",
            ]
        )
    return markdown(table)


def merge_summary(rows: Sequence[dict[str, str]]) -> str:
    """Shows how far the default method is ahead of what it is measured against.

    Args:
        rows: of a merge study, from `read_rows`; all federations for every method.

    Returns:
        A Markdown table: for each network the mean difference of accuracies in points, and in how
        many federations accuracy is higher and negative log-likelihood lower.
    """
    found = by_federation(rows, "method")
    models: dict[str, list[FederationKey]] = {}
    for key in found["fedfisher"]:
        models.setdefault(key.model, []).append(key)
    table = [["`fedfisher` against"], rule(1 + 3 * len(models))]
    for model in models:
        table[0] += [f"{model}: points", "ahead in", "lower NLL in"]
    titles = {method: f"`{method}`" for method in ("fedavg", "regmean", "fedfisher_kfac")}
    titles |= {other: other for other in ("best client", "ensemble")}
    for other in (name for name in titles if name in found):
        line = [titles[other]]
        for federations in models.values():
            points, nll = (
                [float(found["fedfisher"][c][of]) - float(found[other][c][of]) for c in federations]
                for of in ("accuracy", "nll")
            )
            line += [
                f"{statistics.mean(points):+.2f}",
                f"{sum(difference > 0 for difference in points)} of {len(federations)}",
                f"{sum(difference < 0 for difference in nll)} of {len(federations)}",
            ]
        table.append(line)
    return markdown(table)


def compression_table(rows: Sequence[dict[str, str]]) -> str:
    """Shows merged accuracy by the bytes that a client sends.

    Args:
        rows: of a compression study, from `read_rows`; all federations for every size.

    Returns:
        A Markdown table: the mean size in FedAvg uploads; test accuracies in percent (mean, lowest
        and highest over federations); the change in points from sending all as it is, in the mean
        of all federations and in the column where it is least; the negative log-likelihood in nats;
        and how much longer than the extraction alone a client takes.
    """
    found, columns = by_federation(rows, "sent"), columns_of(rows)
    plain, *_ = found.values()
    table = [
        ["sent", "FedAvg uploads", *columns, "change", "least change", "NLL", "client's time"],
        rule(len(columns) + 6),
    ]
    for sent, own in found.items():

        def mean(column: str, own: dict[FederationKey, dict[str, str]] = own) -> float:
            return statistics.mean(float(row[column]) for row in own.values())

        groups = [[float(own[key]["accuracy"]) for key in group] for group in columns.values()]
        before = [[float(plain[key]["accuracy"]) for key in group] for group in columns.values()]
        changes = [
            statistics.mean(now) - statistics.mean(then)
            for now, then in zip(groups, before, strict=True)
        ]
        all_now, all_before = itertools.chain(*groups), itertools.chain(*before)
        time = mean("packing_seconds") / mean("extraction_seconds")
        table.append(
            [
                sent,
                f"{mean('upload'):.2f}",
                *map(spread, groups),
                f"{statistics.mean(all_now) - statistics.mean(all_before):+.2f}",
                f"{min(changes):+.2f}",
                f"{mean('nll'):.2f}",
                f"+{100 * time:.0f}%",
            ]
        )
    return markdown(table)


def hostile_table(rows: Sequence[dict[str, str]]) -> str:
    """Shows merged accuracy beside hostile clients, by what merges.

    Args:
        rows: of a hostile study, from `read_rows`.

    Returns:
        A Markdown table with a row for each network, number of hostile clients and attack, and a
        column for each merge: test accuracies in percent, in the mean over federations.
    """
    found: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for row in rows:
        merges = found.setdefault((row["model"], row["hostile"], row["attack"]), {})
        merges.setdefault(row["merge"], []).append(float(row["accuracy"]))
    columns = list(dict.fromkeys(row["merge"] for row in rows))
    table = [
        [*key, *(f"{statistics.mean(merges[name]):.1f}" for name in columns)]
        for key, merges in found.items()
    ]
    titles = ["network", "hostile", "attack", *columns]
    return markdown([titles, rule(len(titles), left=3), *table])


def _setting(row: dict[str, str]) -> tuple[str, str, str]:
    """What was extracted for a row of the curvature study."""
    return row["curvature"], row["fisher"], row["samples"]
