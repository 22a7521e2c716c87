"""Names that strangers chose, made safe for where they are shown.

The names of clients, layers, files and metadata come from other people's computers. Each place
that shows them has one function here: a terminal, an HTML page, a Markdown table, a W&B address.
"""

from __future__ import annotations

import re
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


def terminal_lines(text: str) -> str:
    r"""Escapes each line of a text of several lines as `terminal_text` does.

    Args:
        text: Lines of ours, in which a stranger's names are escaped already if they may hold line
            breaks.

    Returns:
        The text with its line breaks.

    Example:
        >>> print(terminal_lines("two clients:\n  - a\x1b[2J\n  - b"))
        two clients:
          - a\x1b[2J
          - b
    """
    return "\n".join(map(terminal_text, text.split("\n")))


def markdown_code(text: str) -> str:
    r"""Quotes text as inline code that stays within its cell of a Markdown table.

    Args:
        text: Any text.

    Returns:
        The text between backticks, a question mark for each backtick, vertical bar or character
        that is not printable, and for no text at all.

    Example:
        >>> markdown_code("a|b`c\n")
        '`a?b?c?`'
    """
    return f"`{page_text(text).translate(_MARKUP) or '?'}`"


_MARKUP = str.maketrans("`|", "??")


def markdown_text(text: str) -> str:
    r"""Escapes text that stays text within its line or cell of Markdown.

    Args:
        text: Any text.

    Returns:
        The text, a backslash before each character that could begin markup, and a question mark for
        each that is not printable. Underscores within words begin none.

    Example:
        >>> print(markdown_text("my_model <b>*"))
        my_model \<b\>\*
    """
    return re.sub(r"([\\`*\[\]<>|~&#!$]|\b_|_\b)", r"\\\1", page_text(text))


def markdown_block(text: str) -> str:
    r"""Quotes lines as a block of code that none of them can end.

    Args:
        text: One or more lines.

    Returns:
        The lines between fences of backticks, escaped as for a terminal.

    Example:
        >>> print(markdown_block("fedfisher merge '```'"))
        ````
        fedfisher merge '```'
        ````
    """
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([fence, terminal_lines(text), fence])


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
        The paths without the folders, file name or suffix that all of them share, escaped by
        `terminal_text`. Sources that occur more than once, as those of updates in memory do, become
        ``client-INDEX``.

    Example:
        >>> client_names(["round/berlin/update.safetensors", "round/paris/update.safetensors"])
        ['berlin', 'paris']
    """
    counts = Counter(sources)
    if len(counts) < len(sources):
        return [
            terminal_text(source) if counts[source] == 1 else f"client-{index}"
            for index, source in enumerate(sources)
        ]
    paths = [Path(source) for source in sources]
    if len({path.suffix for path in paths}) == 1:
        paths = [path.with_suffix("") for path in paths]
    parts = [list(path.parts) for path in paths]
    for end in (0, -1):
        while all(len(own) > 1 and own[end] == parts[0][end] for own in parts):
            for own in parts:
                del own[end]
    return [terminal_text("/".join(own)) for own in parts]
