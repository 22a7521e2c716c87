"""Writes results as JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_fedfisher._utils.files import atomic_write
from simulation.environment import environment


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file; a reader sees the old file or the whole new one.

    Args:
        path: of the file.
        content: anything that JSON can hold; what it cannot is written as text.
    """
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=2, default=str) + "\n")


def write_benchmark_report(
    report: Mapping[str, Any],
    config: Mapping[str, Any],
    output: Path | None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Prints the report of a benchmark, and writes it if a file is named.

    Args:
        report: what was measured.
        config: the flags it was measured with.
        output: JSON file to write; None writes none.
        device: that did the work; None means the CPU.

    Returns:
        The report with its ``config`` and ``environment`` (date, hardware and versions).
    """
    about = environment(device or torch.device("cpu"))
    whole = {**report, "config": dict(config), "environment": about}
    print(json.dumps(whole, indent=2, default=str))
    if output is not None:
        write_json(output, whole)
    return whole
