"""Where something ran: versions of packages, and the state of the working folder in git."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("lightning-fedfisher", "lightning", "torch")
"""Packages whose versions decide what comes out."""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what comes out, by name."""
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def provenance() -> dict[str, Any]:
    """Versions, and the commit of the working folder if it is in a git repository.

    Returns:
        ``versions`` by package, and ``git`` with ``commit`` and ``dirty``, or None.
    """
    return {"versions": versions(), "git": _git_state(Path.cwd())}


@cache  # what runs is what was imported, whatever happens to the files later
def _git_state(folder: Path) -> dict[str, Any] | None:
    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", *command], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
