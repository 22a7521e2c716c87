"""Prints recorded results as the Markdown tables of the READMEs.

Usage: ``python recipes/results_table.py recipes/results/*.json``
"""

from __future__ import annotations

import csv
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class _Federation(NamedTuple):
    """The columns that tell a study's cells apart."""

    dataset: str
    model: str
    alpha: str
    partition_seed: str
    seed: str


def results_table(results: Sequence[dict[str, Any]], mean: bool = False) -> str:
    """Puts runs side by side: a row for each model, a column of accuracies for each run.

    Args:
        results: reports in the form of ``results.json``.
        mean: add a column with the mean over the runs, which then should differ in a seed only.

    Returns:
        A Markdown table of test accuracies in percent.
    """
    titles = [_title(result["config"]) for result in results]
    methods = list(dict.fromkeys(name for result in results for name in result["methods"]))
    rows = [
        ["model", "server labels", *titles],
        ["---", "---", *["---:"] * len(titles)],
        ["best single client", "", *(_number(r["best_client"]) for r in results)],
        ["ensemble of all clients", "", *(_number(r["ensemble"]) for r in results)],
    ]
    for method in methods:
        found = [result["methods"].get(method) for result in results]
        labels = max(row["server_labels"] for row in found if row)
        rows.append([f"`{method}`", str(labels), *(_number(row) for row in found)])
    if mean:
        rows[0].append("mean")
        rows[1].append("---:")
        for row in rows[2:]:
            row.append(f"{statistics.mean(float(cell) for cell in row[2:]):.1f}")
    return _markdown(rows)


def costs_table(result: dict[str, Any]) -> str:
    """What each method of one run cost.

    Args:
        result: a report in the form of ``results.json``.

    Returns:
        A Markdown table of sizes and times.
    """
    rows = [
        ["method", "NLL", "upload, bytes a client", "in FedAvg uploads", "client s", "server s"],
        ["---", *["---:"] * 5],
    ]
    for method, row in result["methods"].items():
        rows.append(
            [
                f"`{method}`",
                f"{row['nll']:.3f}",
                f"{row['upload_bytes']:,}",
                f"{row['upload_bytes'] / row['fedavg_bytes']:.2f}",
                f"{row['client_seconds']:.1f}",
                f"{row['server_seconds']:.1f}",
            ]
        )
    return _markdown(rows)


def rounds_table(result: dict[str, Any]) -> str:
    """How the rounds of one run went.

    Args:
        result: a report in the form of ``results.json``, of several rounds.

    Returns:
        A Markdown table of test accuracies in percent.
    """
    methods = list(result["methods"])
    header = ["round", "best single client", "ensemble", *(f"`{name}`" for name in methods)]
    rows = [
        [
            str(each["round"]),
            *map(_number, (each["best_client"], each["ensemble"])),
            *(_number(each["methods"][name]) for name in methods),
        ]
        for each in result["rounds"]
    ]
    return _markdown([header, ["---:"] * len(header), *rows])


def read_rows(path: Path) -> list[dict[str, str]]:
    """Reads the rows of a study.

    Args:
        path: of its CSV file, whose comments tell date and hardware.

    Returns:
        One dictionary a row.
    """
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))


def study_table(rows: Sequence[dict[str, str]]) -> str:
    """Merged accuracy by setting: a column for each federation, and their mean.

    Args:
        rows: from `read_rows`.

    Returns:
        A Markdown table of test accuracies in percent, negative log-likelihoods and upload sizes.
    """
    cells = list(dict.fromkeys(_cell(row) for row in rows))
    settings = list(dict.fromkeys(_setting(row) for row in rows))
    found = {(_setting(row), _cell(row)): row for row in rows}
    table = [
        ["curvature", "Fisher", "samples", *cells, "mean", "NLL", "upload"],
        ["---", "---", "---:", *["---:"] * (len(cells) + 3)],
    ]
    for setting in settings:
        here = [found[setting, cell] for cell in cells]
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
    return _markdown(table)


def merge_table(rows: Sequence[dict[str, str]]) -> str:
    """Every method of a merge study, by network and, for LeNet, alpha.

    Args:
        rows: from `read_rows`; all cells for every method.

    Returns:
        A Markdown table of test accuracies in percent, the mean of the cells with the lowest and
        highest, and of the mean negative log-likelihood.
    """
    found = _by(rows, "method")
    columns = _columns(rows)
    cells = [cell for group in columns.values() for cell in group]
    lenet = [cell for cell in cells if cell.model == "lenet"]
    table = [
        ["method", "server labels", *columns, "lenet mean", "NLL"],
        ["---", *["---:"] * (len(columns) + 3)],
    ]
    for method, own in found.items():
        accuracies = {cell: float(own[cell]["accuracy"]) for cell in cells}
        table.append(
            [
                method,
                str(max(int(own[cell]["server_labels"]) for cell in cells)),
                *(_range([accuracies[cell] for cell in group]) for group in columns.values()),
                f"{statistics.mean(accuracies[cell] for cell in lenet):.2f}" if lenet else "",
                f"{statistics.mean(float(own[cell]['nll']) for cell in cells):.2f}",
            ]
        )
    return _markdown(table)


def merge_summary(rows: Sequence[dict[str, str]]) -> str:
    """How far the default method is ahead of what it is measured against.

    Args:
        rows: from `read_rows`; all cells for every method.

    Returns:
        A Markdown table: for each network the mean difference of accuracies in points, and in how
        many cells accuracy is higher and negative log-likelihood lower.
    """
    found = _by(rows, "method")
    models: dict[str, list[_Federation]] = {}
    for cell in found["fedfisher"]:
        models.setdefault(cell.model, []).append(cell)
    table = [["`fedfisher` against"], ["---", *["---:"] * (3 * len(models))]]
    for model in models:
        table[0] += [f"{model}: points", "ahead in", "lower NLL in"]
    for other in ("fedfisher_kfac", "best client", "ensemble"):
        line = [f"`{other}`" if other == "fedfisher_kfac" else other]
        for cells in models.values():
            points, nll = (
                [float(found["fedfisher"][c][of]) - float(found[other][c][of]) for c in cells]
                for of in ("accuracy", "nll")
            )
            line += [
                f"{statistics.mean(points):+.2f}",
                f"{sum(difference > 0 for difference in points)} of {len(cells)}",
                f"{sum(difference < 0 for difference in nll)} of {len(cells)}",
            ]
        table.append(line)
    return _markdown(table)


def compression_table(rows: Sequence[dict[str, str]]) -> str:
    """Accuracy by the bytes sent.

    Args:
        rows: of a compression study; all cells for everything that was sent.

    Returns:
        A Markdown table: mean size in FedAvg uploads; test accuracies in percent, the mean of the
        cells with the lowest and highest; the change from sending all as it is, in points, in the
        mean of all cells and in the column where it is least; negative log-likelihood; and how much
        longer than the extraction alone a client takes.
    """
    found, columns = _by(rows, "sent"), _columns(rows)
    plain, *_ = found.values()
    table = [
        ["sent", "FedAvg uploads", *columns, "change", "least change", "NLL", "client's time"],
        ["---", *["---:"] * (len(columns) + 5)],
    ]
    for sent, own in found.items():

        def mean(column: str, own: dict[_Federation, dict[str, str]] = own) -> float:
            return statistics.mean(float(row[column]) for row in own.values())

        groups = [[float(own[cell]["accuracy"]) for cell in group] for group in columns.values()]
        before = [[float(plain[cell]["accuracy"]) for cell in group] for group in columns.values()]
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
                *map(_range, groups),
                f"{statistics.mean(all_now) - statistics.mean(all_before):+.2f}",
                f"{min(changes):+.2f}",
                f"{mean('nll'):.2f}",
                f"+{100 * time:.0f}%",
            ]
        )
    return _markdown(table)


def benchmark_table(report: dict[str, Any]) -> str:
    """What extraction cost beside other libraries.

    Args:
        report: of ``extraction_benchmark.py`` on a trained client.

    Returns:
        A Markdown table.
    """
    table = [["what", "seconds", "training epochs"], ["---", "---:", "---:"]]
    for name, row in report["rows"].items():
        if "failed" in row:
            table.append([name, f"failed: {row['failed'].splitlines()[0][:80]}", ""])
        else:
            table.append([name, f"{row['seconds']:.2f}", f"{row['epochs']:.1f}"])
    return _markdown(table)


def extraction_summary(reports: Sequence[dict[str, Any]]) -> str:
    """The figures of extraction benchmarks that matter, a column for each network.

    Args:
        reports: of ``extraction_benchmark.py`` on trained clients.

    Returns:
        A Markdown table.
    """

    def errors(report: dict[str, Any]) -> str:
        found = report["relative_errors"]
        return " / ".join(f"{found[kind]:.0e}" for kind in ("kfac", "diagonal", "ekfac"))

    def memory(report: dict[str, Any]) -> str:
        peaks = report["peak_bytes_batch_250"]
        kinds = ("normalised K-FAC", "exact K-FAC", "exact EKFAC")
        return " / ".join(f"{peaks[kind] / peaks['training']:.1f}" for kind in kinds)

    rows = [
        ["", *(report["config"]["model"] for report in reports)],
        ["---", *["---:"] * len(reports)],
        [
            "the callback's default, in epochs of that client's training",
            *(f"{report['default_epochs']:.2f}" for report in reports),
        ],
        [
            "exact K-FAC, diagonal and EKFAC together: times faster than NNGeometry 0.4's exact "
            "K-FAC and diagonal",
            *(f"{report['times_faster_than_nngeometry']:.1f}" for report in reports),
        ],
        ["their relative error (K-FAC / diagonal / EKFAC)", *map(errors, reports)],
        [
            "peak memory over a training step's, batches of 250 (default / exact K-FAC / EKFAC)",
            *map(memory, reports),
        ],
    ]
    return _markdown(rows)


def large_table(report: dict[str, Any]) -> str:
    """Time and memory of extraction from a large network.

    Args:
        report: of ``extraction_benchmark.py --model resnet18``.

    Returns:
        A Markdown table.
    """
    table = [["what", "seconds", "peak memory, GB"], ["---", "---:", "---:"]]
    for name, row in report["rows"].items():
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
        table.append([name, seconds, f"{row['peak_bytes'] / 1e9:.1f}"])
    return _markdown(table)


def merge_benchmark_table(report: dict[str, Any]) -> str:
    """What the server cost.

    Args:
        report: of ``merge_benchmark.py``.

    Returns:
        A Markdown table.
    """
    header, *rows = merge_benchmark_rows(report)
    return _markdown([header, ["---", *["---:"] * (len(header) - 1)], *rows])


def merge_benchmark_rows(report: dict[str, Any]) -> list[list[str]]:
    """The cells of `merge_benchmark_table`, without its rule.

    Args:
        report: of ``merge_benchmark.py``.

    Returns:
        The header, and a row for each merge or size.
    """
    what = report["config"]["what"]
    first = {"speed": "method", "processes": "processes", "upload": "sent"}.get(what, "clients")
    columns: dict[str, Callable[[dict[str, float]], str]] = {
        "speed": {
            "seconds": lambda row: f"{row['seconds']:.2f}",
            "accuracy": lambda row: f"{row['accuracy']:.1f}",
            "server labels": lambda row: f"{row['labels']}",
        },
        "processes": {
            "seconds": lambda row: f"{row['fit_seconds']:.2f}",
            "CG steps": lambda row: f"{row['iterations']:.0f}",
        },
        "upload": {
            "FedAvg uploads": lambda row: f"{row['uploads']:.2f}",
            "packing, s": lambda row: f"{row['packing_seconds']:.1f}",
            "opening and verifying, s": lambda row: f"{row['verifying_seconds']:.1f}",
            "reading all, s": lambda row: f"{row['reading_seconds']:.1f}",
        },
    }.get(
        what,
        {
            "seconds": lambda row: f"{row['seconds']:.1f}",
            "seconds a client": lambda row: f"{row['seconds'] / row['clients']:.3f}",
            "memory before, MB": lambda row: f"{row['before_bytes'] / 1e6:.0f}",
            "peak memory, MB": lambda row: f"{row['peak_bytes'] / 1e6:.0f}",
            "CG steps": lambda row: f"{row['iterations']:.0f}",
        },
    )
    rows = [[first, *columns]]
    for name, row in report["rows"].items():
        rows.append([name, *(cell(row) for cell in columns.values())])
    return rows


def hostile_table(rows: Sequence[dict[str, str]]) -> str:
    """Merged accuracy beside a hostile client, by what a client may weigh.

    Args:
        rows: of ``hostile_study.py``.

    Returns:
        A row for each attack, a column for each network and bound: the mean over federations.
    """
    found: dict[str, dict[tuple[str, str], list[float]]] = {}
    for row in rows:
        cells = found.setdefault(row["attack"], {})
        cells.setdefault((row["model"], row["bound"]), []).append(float(row["accuracy"]))
    columns = list(dict.fromkeys(cell for cells in found.values() for cell in cells))
    titles = [f"{model}: {'no bound' if bound == 'none' else bound}" for model, bound in columns]
    table = [
        [attack, *(f"{statistics.mean(cells[column]):.1f}" for column in columns)]
        for attack, cells in found.items()
    ]
    return _markdown([["forged", *titles], ["---", *["---:"] * len(titles)], *table])


def fuzz_table(report: dict[str, Any]) -> str:
    """The report of the fuzzer as a Markdown table.

    Args:
        report: of ``fuzz_updates.py``.

    Returns:
        A row for each way to mutate a file.
    """
    header, *rows = fuzz_rows(report)
    return _markdown([header, ["---", *["---:"] * (len(header) - 1)], *rows])


def fuzz_rows(report: dict[str, Any]) -> list[list[str]]:
    """The cells of `fuzz_table`.

    Args:
        report: of ``fuzz_updates.py``.

    Returns:
        The header, a row for each way to mutate a file, and one for all.
    """
    columns = ("files", "refused", "accepted", "merged")
    rows = [[kind, *(row[name] for name in columns)] for kind, row in report["rows"].items()]
    rows.append(["all", *map(sum, list(zip(*rows, strict=True))[1:])])
    numbers = [[kind, *(f"{number:,}" for number in row)] for kind, *row in rows]
    return [["mutation", *columns], *numbers]


def logging_table(report: dict[str, Any]) -> str:
    """The report of the logging benchmark as a Markdown table.

    Args:
        report: of ``logging_benchmark.py``.

    Returns:
        A row for each way to measure, in the mean over runs.
    """
    whole, page = (
        report["runs"]["offline"],
        [run for runs in report["runs"].values() for run in runs],
    )
    pairs = zip(whole, report["runs"]["disabled"], strict=True)
    every = {
        "in logging calls, of a run with W&B": [r["logging_seconds"] / r["seconds"] for r in whole],
        "on record and page, of a run": [r["page_seconds"] / r["seconds"] for r in page],
        "whole runs with W&B, against those without": [
            one["seconds"] / other["seconds"] - 1 for one, other in pairs
        ],
    }
    rows = [[name, _range([100 * share for share in own])] for name, own in every.items()]
    return _markdown([["time", "percent"], ["---", "---:"], *rows])


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(row: dict[str, str]) -> str:
    return f"{row['model']} a{row['alpha']} p{row['partition_seed']}"


def _setting(row: dict[str, str]) -> tuple[str, str, str]:
    return row["curvature"], row["fisher"], row["samples"]


def _federation(row: dict[str, str]) -> _Federation:
    return _Federation(*(row[column] for column in _Federation._fields))


def _by(
    rows: Sequence[dict[str, str]], column: str
) -> dict[str, dict[_Federation, dict[str, str]]]:
    found: dict[str, dict[_Federation, dict[str, str]]] = {}
    for row in rows:
        found.setdefault(row[column], {})[_federation(row)] = row
    return found


def _columns(rows: Sequence[dict[str, str]]) -> dict[str, list[_Federation]]:
    """Federations by the column of a table that they go into: LeNet's by alpha, and the CNN's."""
    cells = sorted(
        dict.fromkeys(map(_federation, rows)),
        key=lambda cell: (cell.model != "lenet", cell.model, float(cell.alpha)),
    )
    columns: dict[str, list[_Federation]] = {}
    for cell in cells:
        title = f"lenet a{cell.alpha}" if cell.model == "lenet" else cell.model
        columns.setdefault(title, []).append(cell)
    return columns


def _range(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f}-{max(values):.1f})"


def _title(config: dict[str, Any]) -> str:
    return (
        f"{config['dataset']}, {config['model']}, alpha {config['alpha']:g}, "
        f"p{config['partition_seed']} s{config['seed']}"
    )


def _number(row: dict[str, float] | None) -> str:
    return "" if row is None else f"{row['accuracy']:.1f}"


if __name__ == "__main__":
    reports = [json.loads(Path(path).read_text()) for path in sys.argv[1:]]
    print(results_table(reports))
    for report in reports:
        print(f"\n{_title(report['config'])}; {report['environment']}\n\n{costs_table(report)}")
        if "rounds" in report:
            print(f"\n{rounds_table(report)}")
