"""The ``fedfisher`` command line: look at updates, check them, merge them, report on it.

The server needs no model code: names and shapes are in the updates, and the result is a state dict.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module

from jsonargparse import Namespace

from lightning_fedfisher.cli.parser import make_parser
from lightning_fedfisher.cli.terminal import REFUSED, complain
from lightning_fedfisher.distributed.failures import RankError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: The words of the command line; those of `sys.argv` if None.

    Returns:
        The exit status: 0, or 1 if an update or a model is refused. A command line that cannot be
        parsed exits with 2 (`SystemExit`).
    """
    flags = make_parser(__doc__).parse_args(arguments)
    # The module of the command's name, which alone imports what it needs.
    module = import_module(f"lightning_fedfisher.cli.{flags.command}")
    run: Callable[[Namespace], int] = module.run
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = _show_warning
        try:
            return run(flags[flags.command])
        except (OSError, ValueError, RankError) as error:
            complain(f"error: {error}", of_any_rank=True)
            return REFUSED


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Prints a warning as one message, without the file and line that raised it."""
    complain(f"warning: {message}")


if __name__ == "__main__":
    sys.exit(main())
