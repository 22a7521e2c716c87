"""The files and the model that a command line names."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path

from torch import nn

from lightning_fedfisher.errors import FedFisherError

_SUFFIX = ".safetensors"


def expand_patterns(patterns: Sequence[str]) -> list[str]:
    """Finds the files that a command line names.

    Args:
        patterns: Files, folders, or patterns with ``*``, ``?``, ``[...]`` or ``**``. What exists,
            also as a folder on the way of a pattern, is taken by its name, whatever is in it.

    Returns:
        Plain names as they are, of folders the ``*.safetensors`` in them, and what each pattern
        matches, both sorted; every file once, by whatever names it is found.

    Raises:
        FedFisherError: If patterns match nothing, or folders hold no such file; all are named.
        OSError: If a folder cannot be read.
    """
    files: dict[str, str] = {}
    offenders: list[str] = []
    for pattern in patterns:
        found = _matches(pattern)
        if not found:
            offenders.append(f"no file matches {pattern}")
        for path in found:
            held = _updates_in(path) if os.path.isdir(path) else [path]
            if not held:
                offenders.append(f"no *{_SUFFIX} is in the folder {path}")
            for file in held:
                files.setdefault(os.path.realpath(file), file)
    if offenders:
        raise FedFisherError("There are no such update files:", offenders)
    return list(files.values())


def _matches(pattern: str) -> list[str]:
    """Finds what a pattern matches, one part of the path after the other."""
    if os.path.lexists(pattern) or not has_magic(pattern):
        return [pattern]
    whole = Path(pattern)
    found = [whole.anchor]
    for part in whole.relative_to(whole.anchor).parts:
        found = [path for folder in found for path in _matches_in(folder, part)]
    if whole.name == "**":  # among what it matches is all that its folders hold
        found = [path for path in found if not os.path.isdir(path)]
    return sorted(dict.fromkeys(found))


def _matches_in(folder: str, part: str) -> list[str]:
    """Finds what one part of a pattern matches in a folder."""
    if part == "**":  # the folder itself, and all below
        below = glob(part, root_dir=folder or None, recursive=True)
        return [folder, *(os.path.join(folder, path) for path in below)]
    path = os.path.join(folder, part)
    if os.path.lexists(path):
        return [path]
    return [os.path.join(folder, name) for name in glob(part, root_dir=folder or None)]


def _updates_in(folder: str) -> list[str]:
    names = sorted(name for name in os.listdir(folder) if name.endswith(_SUFFIX))
    return [os.path.join(folder, name) for name in names]


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
