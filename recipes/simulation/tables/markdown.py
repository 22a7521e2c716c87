"""Writes rows of text as a Markdown table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Joins rows of text into a Markdown table.

    Args:
        rows: the header, the rule below it (as from `rule`) and the rows, all of one length.

    Returns:
        The table, without a newline at its end.
    """
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def rule(columns: int, left: int = 1) -> list[str]:
    """Makes the line between a header and its rows, which aligns the columns.

    Args:
        columns: number of all columns.
        left: number of columns, from the first, whose text is aligned to the left; the others are
            aligned to the right.

    Returns:
        One mark for each column.
    """
    return ["---"] * left + ["---:"] * (columns - left)


def spread(values: Sequence[float]) -> str:
    """Shows numbers by their mean, with the lowest and the highest if there are several.

    Args:
        values: at least one number.

    Returns:
        Text such as ``70.3 (69.4-71.2)``.
    """
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f}-{max(values):.1f})"
