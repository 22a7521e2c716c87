"""Files that are never seen half written, and refusals that say which cannot be, and why."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REMEDIES = {
    **dict.fromkeys(_FULL, "free some space there, or name a file on another disk"),
    **dict.fromkeys(
        (errno.EROFS, errno.EACCES, errno.EPERM), "name a file in a folder that may be written to"
    ),
    **dict.fromkeys(
        (errno.EEXIST, errno.ENOTDIR), "a file stands where a folder is needed: name another folder"
    ),
    errno.EISDIR: "name a file in it",
    errno.ENAMETOOLONG: "choose a shorter name",
}
_OTHERWISE = "name a file in another folder"
# How safetensors, which is written in Rust, tells the number of a system's error.
_TOLD_NUMBER = re.compile(r"I/O error: .*\(os error (\d+)\)", re.DOTALL)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Replaces a file in one step, so that a reader sees the old one or the whole new one.

    Of blocks within each other all write their files, or none does.

    Args:
        path: Path of the file; missing folders are made, and a link is followed.

    Yields:
        A temporary path in the same folder to write to, which no other process takes, on whatever
        machine. It replaces `path` when the block ends, with the permissions of any new file, and
        is removed if the block raises.

    Raises:
        OSError: If the file cannot be written, naming it with the reason and what to do.
    """
    with disk_errors(f"{path} cannot be written", _REMEDIES, _OTHERWISE):
        _require_replaceable(path)
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial_in(path.parent)
        mode = _probe(partial)
        try:
            yield partial
            os.chmod(partial, mode)  # safetensors lets the owner alone read its files
            _settle(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def require_writable(*paths: Path) -> None:
    """Refuses files that cannot be written, before the work whose results they are to hold.

    Nothing is left behind: missing folders are made when the files are written.

    Args:
        *paths: The files to be written.

    Raises:
        OSError: If any of them cannot be, naming each with the reason and what to do.
    """
    refused: list[OSError] = []
    for path in paths:
        try:
            with disk_errors(f"{path} cannot be written", _REMEDIES, _OTHERWISE):
                _require_replaceable(path)
                folder = path.resolve().parent
                while not folder.exists():
                    folder = folder.parent
                _probe(_partial_in(folder))
        except OSError as error:
            refused.append(error)
    if refused:
        told = "; ".join(error.strerror or str(error) for error in refused)
        raise OSError(refused[0].errno, told) from refused[0]


@contextmanager
def disk_errors(told: str, remedies: Mapping[int, str], otherwise: str) -> Iterator[None]:
    """Has errors of a disk say what could not be done, why, and what to do.

    Args:
        told: What could not be done.
        remedies: What to do, by the number of the system's error.
        otherwise: What to do about any other error.

    Yields:
        None.

    Raises:
        OSError: In place of an `OSError`, or of safetensors' own error, with the same number.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError):
            if error.__cause__ is not None:  # told by a block within
                raise
            number, reason = error.errno or errno.EIO, error.strerror or str(error)
        elif found := _TOLD_NUMBER.search(str(error)):
            number = int(found[1])
            reason = os.strerror(number)
        else:
            raise
        # Python makes it of the class that belongs to the number.
        raise OSError(number, f"{told}: {reason}: {remedies.get(number, otherwise)}") from error


def _require_replaceable(path: Path) -> None:
    """Refuses what stands in a file's place and would be lost, such as a folder or a device."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, "it is a folder")
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is no file, but a device or a pipe")
    if not os.access(path, os.W_OK):
        raise OSError(errno.EACCES, "it is write-protected")


def _partial_in(folder: Path) -> Path:
    """Names a temporary file: hidden, so that no pattern takes it for one of the folder's."""
    return folder / f".{secrets.token_hex(8)}.partial"


def _probe(partial: Path) -> int:
    """Writes a block, which takes a folder with room, and returns a new file's permissions."""
    try:
        with partial.open("xb") as file:
            file.write(bytes(4096))
            return stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    finally:
        partial.unlink(missing_ok=True)


def _settle(path: Path) -> None:
    """Has the system write what it holds back, since only then some disks tell that they are full.

    A file system that cannot be asked does not matter.
    """
    with path.open("r+b") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno in (*_FULL, errno.EIO):
                raise
