"""Prints recorded results as the Markdown tables of the READMEs.

Takes the files of `recipes/results/`: reports of runs and benchmarks (JSON) and tables of studies
(CSV), each of which is shown in its own form. Runs are compared side by side as well.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from simulation.rows import read_rows
from simulation.tables.benchmarks import (
    benchmark_table,
    extraction_summary,
    fuzz_table,
    gpu_table,
    large_models_table,
    large_table,
    logging_table,
    merge_benchmark_table,
    real_models_table,
)
from simulation.tables.runs import costs_table, results_table, rounds_table, run_title
from simulation.tables.studies import (
    compression_table,
    hostile_table,
    merge_summary,
    merge_table,
    positions_table,
    study_table,
)


def tables_of_study(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """Makes the tables of a study; its columns tell which study it is.

    Args:
        rows: of its CSV file.

    Yields:
        Markdown tables.
    """
    columns = rows[0].keys()
    if "positions" in columns:
        yield positions_table(rows)
    elif "samples" in columns:
        yield study_table(rows)
    elif "sent" in columns:
        yield compression_table(rows)
    elif "attack" in columns:
        yield hostile_table(rows)
    else:
        yield merge_table(rows)
        yield merge_summary(rows)


def tables_of_report(report: dict[str, Any]) -> Iterator[str]:
    """Makes the tables of one report; its fields tell which recipe wrote it.

    Args:
        report: content of a JSON file.

    Yields:
        Markdown tables.
    """
    config = report["config"]
    if "methods" in report:
        yield costs_table(report)
        if "rounds" in report:
            yield rounds_table(report)
    elif "runs" in report:
        yield logging_table(report)
    elif "plans" in report:
        yield from large_models_table(report).split("\n\n")
    elif "device" in report:
        yield gpu_table(report)
    elif "what" in config:
        yield merge_benchmark_table(report)
    elif "crashes" in report:
        yield fuzz_table(report)
    elif "networks" in report:
        yield real_models_table(report)
    elif "relative_errors" in report:
        yield benchmark_table(report)
        yield extraction_summary([report])
    else:
        yield large_table(report)


def make_parser() -> ArgumentParser:
    """Describes the command line.

    Returns:
        The parser.
    """
    parser = ArgumentParser(prog="tables.py", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="JSON and CSV files to show")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables of the files that the command line names.

    Args:
        arguments: of the command line; None reads `sys.argv`.
    """
    files: list[Path] = make_parser().parse_args(arguments).files
    reports = {path: json.loads(path.read_text()) for path in files if path.suffix == ".json"}
    runs = [report for report in reports.values() if "methods" in report]
    if runs:
        print(results_table(runs))
    for path in files:
        if path in reports:
            report = reports[path]
            title = run_title(report["config"]) if "methods" in report else path.stem
            about, tables = report["environment"], tables_of_report(report)
        else:
            title, about = path.stem, path.read_text().splitlines()[0]
            tables = tables_of_study(read_rows(path))
        print(f"\n{title}; {about}\n")
        print("\n\n".join(tables))


if __name__ == "__main__":
    main()
