"""The names at the top of the package, and what it costs to import it."""

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from helpers.federation import tiny_updates

import lightning_fedfisher

HEAVY = ("lightning", "torchvision", "torchmetrics", "wandb", "pydantic", "plotly", "backpack")
PUBLIC = [name for name in lightning_fedfisher.__all__ if name != "__version__"]


def _loaded(code, *packages):
    """Which of some packages a fresh process has imported after it ran some code."""
    code = (
        f"{code}\nimport sys, json; print(json.dumps([p for p in {packages} if p in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_the_package_imports_nothing_until_it_is_asked():
    assert _loaded("import lightning_fedfisher", "torch", *HEAVY) == []


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "merge_updates"])
def test_every_public_name_is_there(name):
    assert getattr(lightning_fedfisher, name) is not None
    assert name in dir(lightning_fedfisher)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match=r"'lightning_fedfisher' has no attribute 'Fisher'"):
        lightning_fedfisher.Fisher  # noqa: B018


def test_every_lazy_name_is_public_and_every_public_name_has_a_room():
    names = [name for room in lightning_fedfisher._ROOMS.values() for name in room]
    assert sorted(names) == sorted(PUBLIC)


def test_the_version_is_that_of_the_installed_package():
    assert lightning_fedfisher.__version__ == metadata.version("lightning-fedfisher")


def test_versions_are_asked_for_in_one_place():
    sources = Path(lightning_fedfisher.__file__).parent.rglob("*.py")
    asking = re.compile(r"importlib.metadata|importlib import metadata|pkg_resources")
    found = [path.name for path in sources if asking.search(path.read_text())]
    assert found == ["environment.py"]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["inspect", "--help"]])
def test_help_needs_no_lightning(arguments):
    assert _loaded(_command(arguments), *HEAVY) == []


def test_inspect_needs_no_lightning(tmp_path):
    (update,) = tiny_updates(tmp_path, clients=1, epochs=1)
    path = update.save(tmp_path / "one.safetensors")
    assert _loaded(_command(["inspect", str(path)]), *HEAVY) == []
    assert _loaded(_command(["inspect", str(path), "--json"]), *HEAVY) == []


def _command(arguments):
    return (
        "from lightning_fedfisher.cli.main import main\n"
        f"try:\n    status = main({arguments})\n"
        "except SystemExit as stop:\n    status = stop.code\n"
        "assert not status"
    )


def test_rank_zero_does_not_bring_lightning():
    assert _loaded("import lightning_utilities.core.rank_zero", "torch", *HEAVY) == []


@pytest.mark.parametrize("module", ["update.client_update", "merge.methods", "curvature.registry"])
def test_rooms_without_lightning_start_fast(module):
    assert _loaded(f"import lightning_fedfisher.{module}", *HEAVY) == []


def test_a_client_needs_no_pydantic():
    # W&B itself may bring it.
    assert _loaded("from lightning_fedfisher import FedFisherCallback", "pydantic") == []


def test_a_report_without_its_extra_says_how_to_get_it():
    code = (
        "import sys; sys.modules['plotly.graph_objects'] = None\n"
        "import lightning_fedfisher\n"
        "try:\n    lightning_fedfisher.write_report\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'lightning-fedfisher[report]'" in done.stdout
