import errno
import os
import resource
import stat
from contextlib import nullcontext
from glob import glob
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lightning_fedfisher._utils.files import atomic_write, require_writable


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


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("of", ["text", "tensors"])
def test_a_file_has_the_permissions_of_any_new_file(of, tmp_path):
    with atomic_write(tmp_path / "a") as partial:
        if of == "text":
            partial.write_text("whole")
        else:  # which come for the owner alone
            save_file({"a": torch.ones(2)}, partial)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_containers_that_share_a_folder_and_a_process_id_write_beside_each_other(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with atomic_write(tmp_path / "a") as first, atomic_write(tmp_path / "a") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert _content(tmp_path) == {"a": "first"}


def test_a_half_written_file_is_not_found_by_a_pattern(tmp_path):
    with atomic_write(tmp_path / "a.st") as partial:
        partial.write_text("whole")
        assert partial.exists()
        assert glob(f"{tmp_path}/*") == []


def test_a_link_is_followed(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "there" / "b")
    with atomic_write(tmp_path / "a") as partial:
        partial.write_text("whole")
    assert (tmp_path / "a").is_symlink()
    assert _content(tmp_path / "there") == {"b": "whole"}


def test_files_are_written_all_or_none(tmp_path):
    def write():
        with atomic_write(tmp_path / "a") as first, atomic_write(tmp_path / "b") as second:
            first.write_text("a")
            second.write_text("b")
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match=r"/b cannot be written: full: free some space") as told:
        write()
    assert "/a cannot" not in str(told.value)  # told once
    assert _content(tmp_path) == {}


def _fail(number):
    raise OSError(number, os.strerror(number))


def _fail_in_rust(number):
    raise SafetensorError(f"Error while serializing: I/O error: it failed (os error {number})")


@pytest.mark.parametrize("fail", [_fail, _fail_in_rust])
@pytest.mark.parametrize(
    ("number", "kind", "told"),
    [
        (errno.ENOSPC, OSError, "No space left on device: free some space"),
        (errno.EDQUOT, OSError, "uota exceeded: free some space"),
        (errno.EROFS, OSError, "Read-only file system: name a file in a folder that may be"),
        (errno.EACCES, PermissionError, "Permission denied: name a file in a folder that may be"),
        (errno.EIO, OSError, "Input/output error: name a file in another folder"),
    ],
)
def test_a_failure_names_the_file_the_reason_and_a_remedy(fail, number, kind, told, tmp_path):
    def write():
        with atomic_write(tmp_path / "a") as partial:
            partial.write_text("half")
            fail(number)

    with pytest.raises(kind, match=told) as refused:
        write()
    assert f"{tmp_path / 'a'} cannot be written: " in str(refused.value)
    assert refused.value.errno == number
    assert _content(tmp_path) == {}


def test_other_errors_are_not_those_of_the_disk(tmp_path):
    with pytest.raises(ValueError, match=r"^wrong$"), atomic_write(tmp_path / "a"):
        raise ValueError("wrong")


def _in_place(tmp_path):
    """Paths that cannot be written, each with what is told."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    return {
        tmp_path / "file" / "a": "a file stands where a folder is needed",
        tmp_path / "file" / "new" / "a": "a file stands where a folder is needed",
        tmp_path / "folder": "it is a folder: name a file in it",
        tmp_path / "pipe": "a device or a pipe",
        Path(os.devnull): "a device or a pipe",
        tmp_path / ("long" * 100): "choose a shorter name",
        Path("/proc/none/a"): "name a file in another folder",
    }


def test_what_cannot_be_written_is_refused_before_anything_is_written(tmp_path):
    bad = _in_place(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for path, told in bad.items():
        with pytest.raises(OSError, match=told) as refused:
            require_writable(path)
        assert f"{path} cannot be written: " in str(refused.value)
        with pytest.raises(OSError, match=told), atomic_write(path):
            pytest.fail("it should not begin")
    with pytest.raises(OSError, match="cannot be written") as refused:
        require_writable(tmp_path / "fine", *bad)
    for path in bad:  # all at once
        assert f"{path} cannot be written: " in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_check_leaves_nothing_behind(tmp_path):
    (tmp_path / "old").write_text("old")
    require_writable(tmp_path / "old", tmp_path / "new" / "folder" / "a")
    assert _content(tmp_path) == {"old": "old"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_is_tried_before(number, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(OSError, match="cannot be written") as refused:
        require_writable(tmp_path / "a")
    assert refused.value.errno == number


def test_a_write_protected_file_stays(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may all
    with pytest.raises(PermissionError, match="write-protected"):
        require_writable(tmp_path / "a")
    with pytest.raises(PermissionError), atomic_write(tmp_path / "a") as partial:
        partial.write_text("new")
    assert _content(tmp_path) == {"a": "old"}


@pytest.mark.parametrize(
    ("number", "told"), [(errno.ENOSPC, True), (errno.EIO, True), (errno.EINVAL, False)]
)
def test_a_disk_that_tells_late_that_it_is_full_is_heard(number, told, tmp_path, monkeypatch):
    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with (
        pytest.raises(OSError, match="cannot be written") if told else nullcontext(),
        atomic_write(tmp_path / "a") as partial,
    ):
        partial.write_text("whole")
    assert _content(tmp_path) == ({} if told else {"a": "whole"})


@pytest.fixture
def little_room():
    """No file may grow beyond 20,000 bytes: the system itself refuses to write on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("little_room")
@pytest.mark.parametrize(
    "write",
    [
        lambda path: save_file({"a": torch.ones(100_000)}, path),
        lambda path: path.write_text("whole" * 100_000),
    ],
)
def test_a_file_that_the_system_does_not_take_is_told(write, tmp_path):
    def fill():
        with atomic_write(tmp_path / "a") as partial:
            write(partial)

    with pytest.raises(OSError, match="/a cannot be written: File too large: name a file") as told:
        fill()
    assert told.value.errno == errno.EFBIG
    assert _content(tmp_path) == {}
