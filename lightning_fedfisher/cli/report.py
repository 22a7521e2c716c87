"""``fedfisher report``: the record of a federation, drawn on one HTML page."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from lightning_fedfisher.cli.terminal import show
from lightning_fedfisher.results.record import FederationRecord


def run(flags: Namespace) -> int:
    """Writes the report of a federation and prints where it is.

    Args:
        flags: ``run`` and ``output``.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: If the extra ``report`` is not installed, or the file is not a record.
        OSError: If the record cannot be read.
    """
    try:
        from lightning_fedfisher.report.page import FILE_NAME, write_report
        from lightning_fedfisher.report.wording import count
    except ImportError as error:  # of an extra
        raise ValueError(str(error)) from error
    run = Path(flags.run)
    record = FederationRecord.load(run)
    output = Path(flags.output or (run / FILE_NAME if run.is_dir() else run.with_suffix(".html")))
    write_report(record, output)
    held = f"{count(len(record.clients), 'client')}, {count(len(record.merges), 'merge')}"
    show(f"{output}: {held}, {output.stat().st_size:,} bytes")
    return 0
