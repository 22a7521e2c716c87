"""What is offloaded comes back to the bit, and its folder goes with it."""

import errno
import tempfile

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lightning_fedfisher.curvature.base import Identity
from lightning_fedfisher.curvature.kronecker import Kronecker
from lightning_fedfisher.merge.disk_cache import OnDiskCurvatures, OnDiskTensors

CPU = torch.device("cpu")


def test_tensors_come_back_to_the_bit_whatever_their_strides():
    clients = [{"a": torch.randn(3, 4).mT, "b": torch.randn(2)} for _ in range(3)]
    stored = OnDiskTensors(iter(clients), CPU)
    assert len(stored) == 3
    for found, expected in zip(stored, clients, strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(IndexError):
        stored[3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_curvatures_come_back_of_their_kind_and_type(dtype):
    made = [Kronecker(torch.eye(2, dtype=dtype), torch.eye(3, dtype=dtype) * k) for k in (1, 2)]
    stored = OnDiskCurvatures(iter(made), CPU)
    assert stored.kinds == [Kronecker, Kronecker]
    for found, expected in zip(stored, made, strict=True):
        assert torch.equal(found.column_factor, expected.column_factor)
        assert found.column_factor.dtype == dtype


def test_a_curvature_without_tensors_comes_back():
    (found,) = OnDiskCurvatures(iter([Identity((2, 3))]), CPU)
    assert found.shape == (2, 3)


def test_the_folder_goes_with_the_object():
    stored = OnDiskTensors([{"a": torch.ones(1)}], CPU)
    folder = stored._file(0).parent
    assert folder.is_dir()
    del stored
    assert not folder.exists()


@pytest.fixture
def offloaded(tmp_path, monkeypatch):
    """The folder in which what is offloaded has its own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_full_disk_is_told_and_leaves_no_folder(offloaded, monkeypatch):
    written = []

    def fill(tensors, path):
        if written:
            path.write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        written.append(save_file(tensors, path))

    monkeypatch.setattr("lightning_fedfisher.merge.disk_cache.save_file", fill)
    with pytest.raises(OSError, match="No space left on device: set TMPDIR") as told:
        OnDiskTensors([{"a": torch.ones(1)}] * 3, CPU)
    assert f"offloaded to {offloaded}" in str(told.value)
    assert told.value.errno == errno.ENOSPC
    assert "memory_budget" in str(told.value)
    assert list(offloaded.iterdir()) == []  # while the error is still looked at


@pytest.mark.parametrize("error", [ValueError("overflow"), KeyboardInterrupt()], ids=repr)
def test_clients_that_fail_leave_no_folder(error, offloaded):
    def clients():
        yield {"a": torch.ones(1)}
        assert len(list(offloaded.iterdir())) == 1
        raise error

    with pytest.raises(type(error)) as told:
        OnDiskTensors(clients(), CPU)
    assert told.value is error
    assert list(offloaded.iterdir()) == []


def test_a_temporary_folder_that_cannot_be_made_is_told(offloaded):
    offloaded.rmdir()
    with pytest.raises(OSError, match=r"offloaded to a temporary folder: .*TMPDIR"):
        OnDiskTensors([{"a": torch.ones(1)}], CPU)


def test_what_was_emptied_in_between_is_told(offloaded):
    stored = OnDiskTensors([{"a": torch.ones(1)}], CPU)
    stored._file(0).unlink()
    with pytest.raises(OSError, match=f"cannot be read from {offloaded}.* again: .*TMPDIR"):
        stored[0]
