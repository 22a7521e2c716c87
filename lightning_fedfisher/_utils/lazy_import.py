"""Packages whose public names are imported when somebody asks for them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_exports(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Makes the ``__getattr__`` and ``__dir__`` of a package that imports its names on demand.

    Args:
        package: The ``__name__`` of the package.
        homes: For each public name, the full name of the module that defines it.

    Returns:
        The two functions, to be assigned to ``__getattr__`` and ``__dir__`` (PEP 562). An import
        that fails raises its own `ImportError`, and an unknown name an `AttributeError`.

    Example:
        >>> load, names = lazy_exports("json", {"JSONDecodeError": "json.decoder"})
        >>> load("JSONDecodeError")
        <class 'json.decoder.JSONDecodeError'>
        >>> "JSONDecodeError" in names()
        True
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)  # so that it is looked up once
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return load, names
