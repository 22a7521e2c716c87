"""Reads the CSV files that the studies write."""

from __future__ import annotations

import csv
from pathlib import Path


def read_rows(path: Path) -> list[dict[str, str]]:
    """Reads the rows of a study.

    Args:
        path: CSV file; lines that begin with ``#`` (date and hardware) are left out.

    Returns:
        One dictionary for each row, by the name of the column.
    """
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))
