import sys
from types import ModuleType

import pytest

from lightning_fedfisher._utils.lazy_import import lazy_exports


def test_a_name_is_imported_once(monkeypatch):
    package, home = ModuleType("a_package"), ModuleType("a_home")
    home.thing = object()
    monkeypatch.setitem(sys.modules, "a_package", package)
    monkeypatch.setitem(sys.modules, "a_home", home)
    package.__getattr__, package.__dir__ = lazy_exports("a_package", {"thing": "a_home"})
    assert "thing" not in vars(package)
    assert "thing" in dir(package)
    assert package.thing is home.thing
    assert vars(package)["thing"] is home.thing
    with pytest.raises(AttributeError, match="module 'a_package' has no attribute 'other'"):
        package.other  # noqa: B018


def test_an_import_that_fails_tells_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "json.no_such_module", None)
    load, names = lazy_exports("json", {"x": "json.no_such_module"})
    assert "x" in names()
    with pytest.raises(ImportError):
        load("x")
