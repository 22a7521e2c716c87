import pytest
from torch import nn

from lightning_fedfisher import FedFisherError
from lightning_fedfisher.cli.inputs import expand_patterns, make_model


def test_patterns_become_files_each_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.st", "a.st", "c.txt"):
        (tmp_path / name).touch()
    assert expand_patterns(["*.st", "a.st", "missing.st"]) == ["a.st", "b.st", "missing.st"]
    with pytest.raises(FedFisherError) as told:
        expand_patterns(["*.pt", "*.st", "nobody-?"])
    assert told.value.offenders == ("no file matches *.pt", "no file matches nobody-?")


_ODD = "losses=[temporal],seed=1"


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """A folder and files whose names are patterns, beside some that these would match."""
    monkeypatch.chdir(tmp_path)
    for name in (
        f"{_ODD}/a[1].safetensors",
        f"{_ODD}/a1.safetensors",
        f"{_ODD}/notes.txt",
        f"{_ODD}/below/b*?.safetensors",
        f"{_ODD}/below/b77.safetensors",
        "losses=t,seed=1/other.safetensors",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (f"{_ODD}/a[1].safetensors", [f"{_ODD}/a[1].safetensors"]),
        (f"{_ODD}/below/b*?.safetensors", [f"{_ODD}/below/b*?.safetensors"]),
        (_ODD, [f"{_ODD}/a1.safetensors", f"{_ODD}/a[1].safetensors"]),
        (f"{_ODD}/a*.safetensors", [f"{_ODD}/a1.safetensors", f"{_ODD}/a[1].safetensors"]),
        (f"{_ODD}/a[0-9].safetensors", [f"{_ODD}/a1.safetensors"]),
        (f"{_ODD}/*/b7*", [f"{_ODD}/below/b77.safetensors"]),
        ("losses=[t],seed=1/*", ["losses=t,seed=1/other.safetensors"]),
        ("losses*/below", [f"{_ODD}/below/b*?.safetensors", f"{_ODD}/below/b77.safetensors"]),
        (
            f"{_ODD}/**/*.safetensors",
            [
                f"{_ODD}/a1.safetensors",
                f"{_ODD}/a[1].safetensors",
                f"{_ODD}/below/b*?.safetensors",
                f"{_ODD}/below/b77.safetensors",
            ],
        ),
        (
            f"{_ODD}/below/**",
            [f"{_ODD}/below/b*?.safetensors", f"{_ODD}/below/b77.safetensors"],
        ),
    ],
)
@pytest.mark.parametrize("start", ["", "absolute", "../here/"])
def test_what_exists_is_no_pattern(pattern, found, start, odd):
    start = {"absolute": f"{odd}/", "../here/": f"../{odd.name}/"}.get(start, start)
    assert expand_patterns([start + pattern]) == [start + name for name in found]


def test_a_file_counts_once_by_whatever_name_it_is_found(odd):
    (odd / "latest").symlink_to(odd / _ODD)
    names = [f"./{_ODD}/a1.safetensors", _ODD, "latest", f"{odd}/{_ODD}/a*", f"{_ODD}/below/../a*"]
    assert expand_patterns(names) == [f"./{_ODD}/a1.safetensors", f"{_ODD}/a[1].safetensors"]


def test_a_folder_without_updates_is_named_and_so_are_all_others(odd):
    (odd / "empty [0]").mkdir()
    with pytest.raises(FedFisherError) as told:
        expand_patterns(["empty [0]", f"{_ODD}/a1*", "nobody*"])
    assert told.value.offenders == (
        "no *.safetensors is in the folder empty [0]",
        "no file matches nobody*",
    )


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
