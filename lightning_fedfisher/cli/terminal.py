"""What the commands print, with all control characters escaped, and their exit status."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from lightning_fedfisher._utils.text import terminal_lines, terminal_text
from lightning_fedfisher.distributed.processes import process_rank

REFUSED = 1
"""Exit status if an update, a model or a flag's value is refused; 2 is jsonargparse's own."""


def show(*lines: str) -> None:
    """Prints lines whose names or metadata may come from strangers.

    Args:
        *lines: Text without line breaks.
    """
    print(_encodable("\n".join(map(terminal_text, lines)), sys.stdout))


def complain(message: str, of_any_rank: bool = False) -> None:
    """Prints a warning or an error to the standard error stream.

    Args:
        message: One or more lines.
        of_any_rank: Whether ranks other than 0 print it as well, and say which they are: what
            fails on one rank may fail on no other.
    """
    own = process_rank()
    if own == 0 or of_any_rank:
        told = message if own == 0 else f"rank {own}: {message}"
        print(_encodable(terminal_lines(told), sys.stderr), file=sys.stderr)


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


def _encodable(text: str, stream: TextIO) -> str:
    """Escapes what the encoding of a stream lacks, such as letters beyond ASCII."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
