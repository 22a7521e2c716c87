"""One-shot federated learning, simulated end to end on one machine.

Splits a data set over clients, trains each alone with FedFisherCallback on its Trainer, merges the
update files with every chosen method, and compares the merged models with each other, with the best
single client and with the ensemble of all clients. Further rounds start from the merged model.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from simulation.federation import run
from simulation.flags import flags_parser, parse_flags
from simulation.round import warn_in_a_line


def make_parser() -> ArgumentParser:
    """Describes the command line.

    Returns:
        The parser.
    """
    return flags_parser(__doc__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulates a federation from the command line.

    Args:
        arguments: of the command line; None reads `sys.argv`.
    """
    warn_in_a_line()
    os.environ.setdefault("WANDB_SILENT", "true")
    flags = parse_flags(arguments, description=__doc__)
    try:
        run(flags)
    except (OSError, ValueError, MisconfigurationException) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
