"""Where something ran: versions of packages, and the state of the working folder in git."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

_THIS_PACKAGE = "lightning-fedfisher"
# Packages whose versions may change the numbers of an extraction or a merge.
_PACKAGES = (_THIS_PACKAGE, "lightning", "torch")


def package_version() -> str:
    """Reads the version of lightning-fedfisher from its installed metadata."""
    return version(_THIS_PACKAGE)


def versions() -> dict[str, str]:
    """Lists the versions that may change the numbers of an extraction or a merge.

    Returns:
        The versions of Python, lightning-fedfisher, lightning and torch, by name.
    """
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
    }


def provenance() -> dict[str, Any]:
    """Describes where a run started: the versions and the state of the working folder in git.

    Returns:
        ``versions`` as from `versions`, and ``git``: a dict of the ``commit`` and whether the
        folder is ``dirty`` (has changes that are not committed), or None outside a repository.
    """
    return {"versions": versions(), "git": _git_state(Path.cwd())}


@cache  # the running code is what was imported, whatever happens to the files later
def _git_state(folder: Path) -> dict[str, Any] | None:
    """Asks git for the commit of a folder; None without git or outside a repository."""

    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", *command], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
