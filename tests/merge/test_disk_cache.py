"""What is offloaded comes back to the bit, and its folder goes with it."""

import pytest
import torch

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
