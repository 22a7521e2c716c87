"""Names and numbers in the words of a chart or a page."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from itertools import takewhile
from typing import TypeGuard
from unicodedata import east_asian_width

from lightning_fedfisher._utils.text import page_text

_WIDE = frozenset("MWmw@%")


def label(name: str, width: int = 22) -> str:
    """A name short enough for an axis or a title.

    Args:
        name: The name of a client, layer or method.
        width: How many characters the result may take; wide characters count as two.

    Returns:
        The name, with an ellipsis in place of its middle if it is too long.
    """
    text = page_text(name).strip() or "(no name)"
    kept = len(text)
    short = text
    while _width(short) > width:
        kept -= 1
        short = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
    return short


def labels(names: Sequence[str], width: int = 22) -> list[str]:
    """Names short enough for one axis, where they must be told apart.

    Args:
        names: The names of all clients, layers or methods on the axis.
        width: How many characters each may take; wide characters count as two.

    Returns:
        The names. If one is too long, all of them lose the beginning or end that they share, and
        those that are still too long lose their middle.
    """
    texts = [page_text(name).strip() for name in names]
    if len(set(texts)) > 1 and max(map(_width, texts)) > width:
        # Only whole words are cut off.
        head = re.sub(r"[^\W_]*$", "", _shared(texts))
        tail = re.sub(r"^[^\W_]*", "", _shared([text[::-1] for text in texts])[::-1])
        if len(head) >= len(tail):
            texts = [f"…{text[len(head) :]}" if head else text for text in texts]
        else:
            texts = [f"{text[: -len(tail)]}…" for text in texts]
    return [label(text, width) for text in texts]


def _shared(texts: Sequence[str]) -> str:
    """Finds the beginning that all texts share."""
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False))
    return "".join(column[0] for column in alike)


def _width(text: str) -> float:
    """Estimates how wide a text is drawn, in letters of usual width."""
    return sum(2 if east_asian_width(c) in "WF" else 1.6 if c in _WIDE else 1 for c in text)


def marked(text: str) -> str:
    """Escapes text for plotly, which reads some of it as tags and some as templates."""
    return html.escape(page_text(text), quote=False).replace("%{", "&#37;{")


def number(value: float) -> str:
    """Writes a number to three digits, as people write it.

    Args:
        value: Any number, also infinite or not a number.

    Returns:
        Text like ``0.25``, ``12,300`` or ``9.1 x 10^-7``, the last with a proper cross and
        exponent.

    Example:
        >>> number(12345), number(0.25)
        ('12,300', '0.25')
    """
    if not math.isfinite(value):
        return "infinite" if value == math.inf else "not a number"
    if value == 0 or 1e-3 <= abs(value) < 999.5:
        return f"{value:.3g}"
    if abs(value) < 1e6 and abs(value) >= 1:
        return f"{float(f'{value:.3g}'):,.0f}"
    digits, _, power = f"{value:.1e}".partition("e")
    ten = "10" + str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return ten if digits == "1.0" else f"{digits.removesuffix('.0')} \u00d7 {ten}"


def percent(part: float, whole: float) -> str:
    """Writes a share in percent, as 0 or 100 only if it is exactly that.

    Args:
        part: The part, not negative.
        whole: The whole, positive and at least as large as the part.

    Returns:
        Text like ``41%``, ``0.3%`` or ``less than 0.1%``.

    Example:
        >>> percent(41, 100), percent(1, 100_000)
        ('41%', 'less than 0.1%')
    """
    share = 100 * part / whole
    if share in (0, 100) or 1 <= share <= 99:
        return f"{share:.0f}%"
    if share < 0.1:
        return "less than 0.1%"
    return "more than 99.9%" if share > 99.9 else f"{share:.1f}%"


def count(amount: int, what: str, many: str = "") -> str:
    """Writes an amount with its noun, in the plural unless it is one."""
    return f"{amount:,} {what if amount == 1 else many or f'{what}s'}"


def sentences(*parts: str) -> str:
    """Joins the parts that are not empty into sentences, for a subtitle."""
    return " ".join(f"{part}." for part in parts if part)


def is_known(value: float | None) -> TypeGuard[float]:
    """Tells whether a value is there and finite."""
    return value is not None and math.isfinite(value)


def is_drawn(value: float) -> bool:
    """Tells whether a logarithmic axis can hold a value and have its ends beyond it."""
    return 1e-300 < value < 1e300
