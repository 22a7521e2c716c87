"""A file with every group of tensors."""

import pytest
from helpers.update_files import content, make_update, read


@pytest.fixture
def file(tmp_path):
    return make_update()[2].save(tmp_path / "client.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Bytes and content of a file with every group of tensors."""
    path = tmp_path_factory.mktemp("saved") / "client.safetensors"
    make_update()[2].save(path)
    return path.read_bytes(), content(read(path))
