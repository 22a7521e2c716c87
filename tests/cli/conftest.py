import shutil
import sys

import pytest
from helpers.federation import tiny_updates

CLIENTS = 10


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    tiny_updates(folder, clients=CLIENTS, epochs=1)
    return folder


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "updates")
    (tmp_path / "factories.py").write_text(
        "from helpers.federation import TinyClassifier\n"
        "fitting = TinyClassifier\n"
        "foreign = lambda: TinyClassifier(bias=False)\n"
        "nothing = int\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "factories", raising=False)
    return tmp_path


@pytest.fixture
def damage():
    """Returns a function that changes one bit of a file's last tensor."""
    return _damage


def _damage(path):
    content = bytearray(path.read_bytes())
    content[-60] ^= 1
    path.write_bytes(content)
