"""What the commands print, with all control characters escaped, and their exit status."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning_fedfisher._utils.text import terminal_text
from lightning_fedfisher.distributed.processes import is_rank_zero

REFUSED = 1
"""Exit status if an update, a model or a flag's value is refused; 2 is jsonargparse's own."""


def show(*lines: str) -> None:
    """Prints lines whose names or metadata may come from strangers.

    Args:
        *lines: Text without line breaks.
    """
    print("\n".join(map(terminal_text, lines)))


def complain(message: str) -> None:
    """Prints a warning or an error to the standard error stream, on rank 0 only.

    Args:
        message: One or more lines.
    """
    if is_rank_zero():
        print("\n".join(map(terminal_text, message.splitlines())), file=sys.stderr)


def columns(rows: Sequence[Sequence[str]], alignment: str) -> list[str]:
    """Lays a table out in columns of equal width.

    Args:
        rows: The cells, row by row, each row of the same length.
        alignment: One character for each column: ``<`` for text at the left, ``>`` for numbers at
            the right.

    Returns:
        One line for each row, its cells two spaces apart.

    Example:
        >>> columns([("layer", "bytes"), ("head", "12")], "<>")
        ['layer  bytes', 'head      12']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{c:{to}{w}}" for c, to, w in zip(row, alignment, widths, strict=True))
        for row in rows
    ]
