"""The files and the model that a command line names."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from glob import glob, has_magic

from torch import nn


def expand_patterns(patterns: Sequence[str]) -> list[str]:
    """Finds the files that patterns match.

    Args:
        patterns: File names, or patterns with ``*``, ``?``, ``[...]`` or ``**``.

    Returns:
        The matches of each pattern, sorted, and plain names as they are; every file once.

    Raises:
        ValueError: If a pattern matches no file.
    """
    files: list[str] = []
    for pattern in patterns:
        found = sorted(glob(pattern, recursive=True)) if has_magic(pattern) else [pattern]
        if not found:
            raise ValueError(f"no file matches {pattern}")
        files += found
    return list(dict.fromkeys(files))


def make_model(factory: str | None) -> nn.Module | None:
    """Calls the function that ``--model`` names.

    Args:
        factory: ``module.path:function``, looked for in the working folder as well; None if the
            flag was not given.

    Returns:
        The model that the function makes; None without the flag.

    Raises:
        ValueError: If the function cannot be imported or called, or makes no torch module.
    """
    if factory is None:
        return None
    module, _, name = factory.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        model = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"--model {factory} makes no model: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {factory} makes a {type(model).__name__}, not a torch module")
    return model
