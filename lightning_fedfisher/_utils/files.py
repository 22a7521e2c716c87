"""Files that are never seen half written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Replaces a file in one step, so that a reader sees the old one or the whole new one.

    Args:
        path: Path of the file; missing folders are made.

    Yields:
        A temporary path to write to. It replaces `path` when the block ends, and is removed if the
        block raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
