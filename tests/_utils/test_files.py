import os

import pytest

from lightning_fedfisher._utils.files import atomic_write


def _content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_file_is_whole_when_it_is_there(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    with atomic_write(path) as partial:
        partial.write_text("half")
        assert not path.exists()
        assert partial.parent == path.parent  # a file cannot be moved between disks in one step
        partial.write_text("whole")
    assert _content(path.parent) == {"a.txt": "whole"}


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with path.open() as reader:
        with atomic_write(path) as partial:
            partial.write_text("new")
            assert path.read_text() == "old"
        assert reader.read() == "old"  # who has it open keeps it
    assert _content(tmp_path) == {"a.txt": "new"}


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("written", [True, False])
def test_a_failure_leaves_the_old_file_and_nothing_else(written, error, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write():
        with atomic_write(path) as partial:
            if written:
                partial.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert _content(tmp_path) == {"a.txt": "old"}


def test_a_block_that_writes_nothing_is_told(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a.txt"):
        pass
    assert _content(tmp_path) == {}


def test_processes_write_beside_each_other(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    with atomic_write(path) as first:
        monkeypatch.setattr(os, "getpid", lambda: 0)
        with atomic_write(path) as second:
            assert first != second
            first.write_text("first")
            second.write_text("second")
        assert path.read_text() == "second"
    assert _content(tmp_path) == {"a.txt": "first"}
