"""Names that strangers chose, made safe for where they are shown.

The names of clients, layers, files and metadata come from other people's computers. Each place
that shows them has one function here: a terminal, an HTML page, a Markdown table, a W&B address.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

_LONGEST_TITLE = 128  # characters of a W&B report's title


def terminal_text(text: str) -> str:
    r"""Escapes what a terminal would act on or not show: control characters and their like.

    Args:
        text: One line of text.

    Returns:
        The text, each character that is not printable in Python's escaped form.

    Example:
        >>> print(terminal_text("ward 3\x1b[2J"))
        ward 3\x1b[2J
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, most: int = 80) -> str:
    """Leaves out the middle of a long text.

    Args:
        text: Any text.
        most: Characters that are left of it.

    Returns:
        The text, or its beginning and its end around three dots.

    Example:
        >>> shortened("encoder.layers.0.attention.projection", 20)
        'encoder.l...ojection'
    """
    if len(text) <= most:
        return text
    end = (most - 3) // 2
    return f"{text[: most - 3 - end]}...{text[-end:]}"


def page_text(text: str) -> str:
    r"""Replaces characters that would hide, reverse or break a line of a page or a chart.

    This does not escape HTML: a template or `wording.marked` does that.

    Args:
        text: Any text.

    Returns:
        Text of the same length, a question mark for each character that is not printable.

    Example:
        >>> page_text("ward\n3\u202e")
        'ward?3?'
    """
    return "".join(c if c.isprintable() else "?" for c in text)


def markdown_code(text: str) -> str:
    r"""Quotes text as inline code that stays within its cell of a Markdown table.

    Args:
        text: Any text.

    Returns:
        The text between backticks, a question mark for each backtick, vertical bar or character
        that is not printable.

    Example:
        >>> markdown_code("a|b`c\n")
        '`a?b?c?`'
    """
    return f"`{page_text(text).translate(_MARKUP)}`"


_MARKUP = str.maketrans("`|", "??")


def wandb_title(text: str) -> str:
    """Makes a title for W&B, which puts it into an address and allows no symbols there.

    Args:
        text: Any text.

    Returns:
        At most 128 characters, a hyphen for each that is no letter, digit, space or one of
        ``_.,-()``.

    Example:
        >>> wandb_title("Federation alpha=0.1/beta")
        'Federation alpha-0.1-beta'
    """
    plain = "".join(c if c.isalnum() or c in " _.,-()" else "-" for c in text)
    return plain[:_LONGEST_TITLE]


def client_names(sources: Sequence[str]) -> list[str]:
    """Names clients by the part of their files' paths that tells them apart.

    Args:
        sources: The path of each client's update, or a word for an update in memory.

    Returns:
        The paths without the folders, file name or suffix that all of them share. Sources that
        occur more than once, as those of updates in memory do, become ``client-INDEX``.

    Example:
        >>> client_names(["round/berlin/update.safetensors", "round/paris/update.safetensors"])
        ['berlin', 'paris']
    """
    counts = Counter(sources)
    if len(counts) < len(sources):
        return [s if counts[s] == 1 else f"client-{index}" for index, s in enumerate(sources)]
    paths = [Path(source) for source in sources]
    if len({path.suffix for path in paths}) == 1:
        paths = [path.with_suffix("") for path in paths]
    parts = [list(path.parts) for path in paths]
    for end in (0, -1):
        while all(len(own) > 1 and own[end] == parts[0][end] for own in parts):
            for own in parts:
                del own[end]
    return ["/".join(own) for own in parts]
