"""Markdown tables of runs of `cifar_resnet.py`: accuracies, costs and rounds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from simulation.tables.markdown import markdown, rule

_USUAL_CLIENTS = 5


def results_table(results: Sequence[dict[str, Any]], mean: bool = False) -> str:
    """Shows runs side by side: a row for each model, a column of accuracies for each run.

    Args:
        results: contents of the ``results.json`` of each run.
        mean: whether to add a column with the mean over the runs; they should then differ in a
            seed only.

    Returns:
        A Markdown table of test accuracies in percent.
    """
    titles = [run_title(result["config"]) for result in results]
    methods = list(dict.fromkeys(name for result in results for name in result["methods"]))
    rows = [
        ["model", "server labels", *titles],
        rule(2 + len(titles), left=2),
    ]
    if any(r["best_client"] for r in results):  # heads in closed form alone have none
        rows += [
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
    return markdown(rows)


def costs_table(result: dict[str, Any]) -> str:
    """Shows what each method of one run cost.

    Args:
        result: content of the run's ``results.json``.

    Returns:
        A Markdown table of negative log-likelihoods, upload sizes and seconds.
    """
    rows = [
        ["method", "NLL", "upload, bytes a client", "in FedAvg uploads", "client s", "server s"],
        rule(6),
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
    return markdown(rows)


def rounds_table(result: dict[str, Any]) -> str:
    """Shows how the rounds of one run went.

    Args:
        result: content of the ``results.json`` of a run of several rounds.

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
    return markdown([header, rule(len(header), left=0), *rows])


def run_title(config: dict[str, Any]) -> str:
    """Names a run by what its federation was made of.

    Args:
        config: the ``config`` of its ``results.json``.

    Returns:
        Text such as ``fashionmnist, lenet, alpha 0.1, p3 s0`` (partition and training seed), with
        the numbers of classes, samples and clients where they are not the usual ones.
    """
    data, clients = config["dataset"], config.get("clients", _USUAL_CLIENTS)
    options = config.get("options", {})  # of runs that start from a pre-trained network
    told = [f"{options['classes']} classes"] if "classes" in options else []
    if options and config["max_train_samples"]:
        told.append(f"{config['max_train_samples']:,} samples")
    if told:
        data += f" ({', '.join(told)})"
    one_place = "in one place" if clients == 1 else f"alpha {config['alpha']:g}"
    others = f", {clients} clients" if clients not in (1, _USUAL_CLIENTS) else ""
    seeds = f"p{config['partition_seed']} s{config['seed']}"
    return f"{data}, {config['model']}, {one_place}, {seeds}{others}"


def _number(row: dict[str, float] | None) -> str:
    """An accuracy with one decimal, or nothing for a method that a run lacks."""
    return f"{row['accuracy']:.1f}" if row else ""
