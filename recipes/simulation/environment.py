"""What recorded times depend on: date, versions and hardware."""

from __future__ import annotations

import os
import platform
from datetime import datetime

import lightning
import torch


def environment(device: torch.device) -> dict[str, str]:
    """Describes where and when a measurement is made.

    Args:
        device: that does the work: a GPU is named, of a CPU the cores are counted.

    Returns:
        ``date``, ``hardware``, and the versions of ``python``, ``torch`` and ``lightning``.
    """
    processor = f"{os.cpu_count()} cores, {platform.machine()}"
    return {
        "date": f"{datetime.now():%Y-%m-%d}",
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else processor,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }
