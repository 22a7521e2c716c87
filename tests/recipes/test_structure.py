"""What may import what in recipes/, and that every script answers and is documented."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"


def module_name(path):
    parts = path.relative_to(RECIPES).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_script(path):
    """Scripts are started by name, modules of simulation/ with ``python -m`` at most."""
    return "simulation" not in path.parts and '__name__ == "__main__"' in path.read_text()


FILES = sorted(RECIPES.rglob("*.py"))
SCRIPTS = [path for path in FILES if is_script(path)]
SCRIPT_NAMES = {module_name(path) for path in SCRIPTS}
FOLDERS = {path.name for path in RECIPES.iterdir() if path.is_dir()}


def imported_names(path):
    """Everything that a file imports, as module names and as names in modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by a relative name"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_scripts_are_found():
    assert {"cifar_resnet", "studies.tables", "fuzzing.fuzz_updates"} <= SCRIPT_NAMES
    assert len(SCRIPTS) == 16
    assert "fuzzing.mutations" not in SCRIPT_NAMES


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nothing_imports_a_script(path):
    assert not SCRIPT_NAMES & set(imported_names(path))


@pytest.mark.parametrize(
    "path", sorted((RECIPES / "simulation").rglob("*.py")), ids=lambda path: path.stem
)
def test_simulation_imports_no_other_folder_but_peers(path):
    others = (FOLDERS - {"simulation", "peers"}) | {"cifar_resnet"}
    assert not others & {name.partition(".")[0] for name in imported_names(path)}


@pytest.mark.parametrize(
    "path", sorted((RECIPES / "peers").rglob("*.py")), ids=lambda path: path.stem
)
def test_peers_read_on_their_own(path):
    known = FOLDERS | {"lightning_fedfisher"}
    assert not known & {name.partition(".")[0] for name in imported_names(path)}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_are_short_and_named_for_what_they_hold(path):
    assert len(path.read_text().splitlines()) <= 400
    assert path.stem not in {"utils", "helpers", "misc", "common"}


@pytest.mark.parametrize("path", SCRIPTS, ids=module_name)
def test_every_script_answers_help(path, capsys):
    script = importlib.import_module(module_name(path))
    with pytest.raises(SystemExit) as left:
        script.main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {path.name}")
    first_sentence = script.__doc__.split("\n")[0]
    assert " ".join(first_sentence.split()) in " ".join(text.split())


def test_scripts_run_by_their_path():
    """One of them, which imports little: the others begin in the same way."""
    command = [sys.executable, str(RECIPES / "studies" / "tables.py"), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(RECIPES)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: tables.py")


@pytest.mark.parametrize("path", SCRIPTS, ids=module_name)
def test_every_script_has_a_row_in_the_readme_beside_it(path):
    assert f"\n| `{path.name}` | " in path.with_name("README.md").read_text()


@pytest.mark.parametrize("folder", sorted(FOLDERS - {"__pycache__"}))
def test_every_folder_has_a_row_in_the_front_readme(folder):
    text = (RECIPES / "README.md").read_text()
    assert f"\n| [{folder}/]({folder}/README.md) | " in text or f"\n| `{folder}/` | " in text
