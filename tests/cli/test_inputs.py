import pytest
from torch import nn

from lightning_fedfisher.cli.inputs import expand_patterns, make_model


def test_patterns_become_files_each_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.st", "a.st", "c.txt"):
        (tmp_path / name).touch()
    assert expand_patterns(["*.st", "a.st", "missing.st"]) == ["a.st", "b.st", "missing.st"]
    with pytest.raises(ValueError, match=r"no file matches \*\.pt"):
        expand_patterns(["*.st", "*.pt"])


def test_a_model_is_made_by_a_function_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "its_models.py").write_text(
        "from torch import nn\nmake = lambda: nn.Linear(2, 3)\n"
    )
    model = make_model("its_models:make")
    assert isinstance(model, nn.Linear)
    assert make_model(None) is None
    for factory, told in (
        ("its_models:nn", "makes no model"),
        ("its_models:other", "makes no model"),
        ("no_module:make", "makes no model"),
        ("builtins:int", "makes a int, not a torch module"),
    ):
        with pytest.raises(ValueError, match=told):
            make_model(factory)
