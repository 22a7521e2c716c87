"""Scripts that run in several processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def run_ddp(script: Path | str, *arguments: object, timeout: float = 90) -> None:
    """Runs a script whose Trainer launches more processes, and says so if one of them hangs."""
    command = [sys.executable, str(script), *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        pytest.fail("a DDP worker hung")
    assert done.returncode == 0, done.stderr[-3000:]
