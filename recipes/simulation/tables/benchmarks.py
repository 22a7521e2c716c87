"""Markdown tables of the benchmarks and of the fuzzer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from simulation.tables.markdown import markdown, rule, spread


def benchmark_table(report: dict[str, Any]) -> str:
    """Shows what extraction costs beside other libraries.

    Args:
        report: of ``extraction_benchmark.py`` on a trained client.

    Returns:
        A Markdown table of seconds and training epochs.
    """
    table = [["what", "seconds", "training epochs"], rule(3)]
    for name, row in report["rows"].items():
        if "failed" in row:
            table.append([name, f"failed: {row['failed'].splitlines()[0][:80]}", ""])
        else:
            table.append([name, f"{row['seconds']:.2f}", f"{row['epochs']:.1f}"])
    return markdown(table)


def extraction_summary(reports: Sequence[dict[str, Any]]) -> str:
    """Shows the main figures of extraction benchmarks, a column for each network.

    Args:
        reports: of ``extraction_benchmark.py`` on trained clients.

    Returns:
        A Markdown table of times, errors and memory.
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
        rule(1 + len(reports)),
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
    return markdown(rows)


def large_table(report: dict[str, Any]) -> str:
    """Shows time and memory of extraction from a large network.

    Args:
        report: of ``extraction_benchmark.py --model resnet18``.

    Returns:
        A Markdown table of seconds and gigabytes.
    """
    table = [["what", "seconds", "peak memory, GB"], rule(3)]
    for name, row in report["rows"].items():
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
        table.append([name, seconds, f"{row['peak_bytes'] / 1e9:.1f}"])
    return markdown(table)


def merge_benchmark_table(report: dict[str, Any]) -> str:
    """Shows what the server costs.

    Args:
        report: of ``merge_benchmark.py``.

    Returns:
        A Markdown table; its columns depend on what was measured.
    """
    header, *rows = merge_benchmark_rows(report)
    return markdown([header, rule(len(header)), *rows])


def merge_benchmark_rows(report: dict[str, Any]) -> list[list[str]]:
    """Gives the text of `merge_benchmark_table`, cell by cell.

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


def fuzz_table(report: dict[str, Any]) -> str:
    """Shows what became of mutated files.

    Args:
        report: of ``fuzz_updates.py``.

    Returns:
        A Markdown table with a row for each way to mutate a file, and one for all.
    """
    header, *rows = fuzz_rows(report)
    return markdown([header, rule(len(header)), *rows])


def fuzz_rows(report: dict[str, Any]) -> list[list[str]]:
    """Gives the text of `fuzz_table`, cell by cell.

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
    """Shows what logging costs.

    Args:
        report: of ``logging_benchmark.py``.

    Returns:
        A Markdown table of percentages (mean, lowest and highest over runs), a row for each way to
        measure.
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
    rows = [[name, spread([100 * part for part in own])] for name, own in every.items()]
    return markdown([["time", "percent"], rule(2), *rows])


def large_models_table(report: dict[str, Any]) -> str:
    """Shows what the curvature of large models takes: planned, measured and estimated.

    Args:
        report: of ``large_models.py``.

    Returns:
        Two Markdown tables: plans and estimates of whole models, and the layers that were measured
        beside their plans.
    """
    header = ["model", "curvature", "file, GB", "client, GB", "server, GB", "largest factor"]
    rows = [[*header, "merge, hours (estimate)"]]
    rows.append(rule(len(rows[0]), left=2))
    for name, plans in report["plans"].items():
        for kind, plan in plans.items():
            sizes = [plan[f"{part}_bytes"] / 1e9 for part in ("file", "client", "server")]
            estimate = report["estimates"][name].get(kind)
            hours = f"{estimate['merge_seconds'] / 3600:.1f}" if estimate else ""
            factor = f"{plan['largest_factor']:,}" if plan["largest_factor"] else ""
            rows.append([name, kind, *(f"{size:.1f}" for size in sizes), factor, hours])
    parts = ("extraction", "merge")
    header = ["three layers", *(f"{part}, {of}" for part in parts for of in ("s", "GB", "planned"))]
    measured = [header, rule(len(header))]
    for kind, found in report["measured"].items():
        cells = [kind]
        for part in parts:
            sizes = [found[part][name] / 1e9 for name in ("peak_bytes", "planned_bytes")]
            cells += [f"{found[part]['seconds']:.1f}", *(f"{size:.2f}" for size in sizes)]
        measured.append(cells)
    return f"{markdown(rows)}\n\n{markdown(measured)}"


def gpu_table(report: dict[str, Any]) -> str:
    """Shows the same work on the CPU and on another device.

    Args:
        report: of ``gpu_check.py``.

    Returns:
        A Markdown table of seconds and of the largest relative difference, and another one of the
        large networks if there are any.
    """
    header = ["model", "step", "CPU, s", f"{report['device']}, s", "relative difference"]
    rows = [
        [
            *(row["model"], row["step"], f"{row['cpu_seconds']:.2f}"),
            *(f"{row['device_seconds']:.2f}", f"{row['relative_difference']:.0e}"),
        ]
        for row in report["rows"]
    ]
    tables = [[header, rule(len(header), left=2), *rows]] if rows else []
    if report.get("large"):
        tables.append(_large_gpu_rows(report))
    return "\n\n".join(map(markdown, tables))


def _large_gpu_rows(report: dict[str, Any]) -> list[list[str]]:
    """Text of the table of large networks; of a step that was not reached it is empty."""
    timed = ("training", "extraction", "merge")
    header = [
        *("model", "weights, M", "relative difference", "training, ms a sample"),
        *("extraction, s", "x training", "packing, s", "merge, s", "CG steps"),
        *(f"{step}, GB" for step in timed),
    ]
    rows = [header, rule(len(header))]
    for row in report["large"]:
        if reason := row.get("missing", row.get("failed")):
            what = "left out" if "missing" in row else "failed"
            text = f"{what}: {' '.join(reason.split())[:120]}"
            rows.append([row["model"], text, *[""] * (len(header) - 2)])
            continue
        a_sample = row["extraction_seconds"] / row["curvature_samples"]
        rows.append(
            [
                *(row["model"], f"{row['parameters'] / 1e6:.1f}"),
                f"{row['relative_difference']:.0e}",
                f"{1e3 * row['training_seconds']:.2f}",
                f"{row['extraction_seconds']:.1f}",
                f"{a_sample / row['training_seconds']:.2f}",
                *(f"{row['packing_seconds']:.1f}", f"{row['merge_seconds']:.1f}"),
                f"{row['iterations']}",
                # Nothing measures it on a CPU.
                *(
                    f"{row[f'{step}_bytes'] / 1e9:.1f}" if row[f"{step}_bytes"] else ""
                    for step in timed
                ),
            ]
        )
    return rows


def real_models_table(report: dict[str, Any]) -> str:
    """Shows what real networks cost, in units of their own training.

    Args:
        report: of ``real_models.py``.

    Returns:
        A Markdown table with a row for each network: the extraction and other libraries' K-FAC in
        multiples of training a sample, all of the callback in epochs, packing alone, the file in
        FedAvg uploads, peak memory in multiples of training's, and the server's seconds, memory,
        solver iterations and residual.
    """
    peers = list(
        dict.fromkeys(name for row in report["networks"].values() for name in row.get("peers", {}))
    )
    methods = ("fedavg", "fedfisher")
    header = [
        *("network", "x training", "epochs", "of which packing", "upload", "memory"),
        *peers,
        *(f"`{method}`, s" for method in methods),
        *(f"`{method}`, MB" for method in methods),
        *("CG steps", "residual"),
    ]
    rows = [header, rule(len(header))]
    for name, row in report["networks"].items():
        if "failed" in row:
            reason = " ".join(row["failed"].split())
            rows.append([name, f"failed: {reason[:120]}", *[""] * (len(header) - 2)])
            continue
        merges = row.get("merge", {})
        fits = row["training"].get("peak_bytes")
        rows.append(
            [
                *(name, f"{row['times_training']:.2f}", f"{row['epochs']:.3f}"),
                *(f"{row['packing_epochs']:.3f}",),
                f"{row['upload_bytes'] / row['fedavg_bytes']:.2f}",
                f"{row['peak_bytes'] / fits:.1f}" if fits else "",
                *(_cell(row.get("peers", {}).get(peer), "times_training", ".2f") for peer in peers),
                *(_cell(merges.get(method), "seconds", ".1f") for method in methods),
                *(_cell(merges.get(method), "peak_bytes", ".0f", 1e6) for method in methods),
                _cell(merges.get("fedfisher"), "iterations", "d"),
                _cell(merges.get("fedfisher"), "residual", ".0e"),
            ]
        )
    return markdown(rows)


def _cell(measured: dict[str, Any] | None, field: str, form: str, unit: float = 1) -> str:
    """One number, in a unit; a word if its measurement failed, and nothing if there was none."""
    if measured is None:
        return ""
    if "failed" in measured:
        return "failed"
    return format(measured[field] / unit if unit != 1 else measured[field], form)
