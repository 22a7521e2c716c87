"""Prints recorded results as the Markdown tables of the READMEs.

Usage: ``python recipes/results_table.py recipes/results/*.json``
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


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
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


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
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


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
