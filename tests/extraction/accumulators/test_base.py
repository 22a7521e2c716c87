import pytest
import torch

from lightning_fedfisher.curvature import Diagonal, Kronecker
from lightning_fedfisher.extraction.accumulators.diagonal import DiagonalAccumulator
from lightning_fedfisher.extraction.accumulators.kronecker import KroneckerAccumulator
from lightning_fedfisher.layers import Layer

LAYER = Layer("layer", (("layer.weight", (5, 4)),))


def test_sums_start_at_zero_in_the_dtype_asked_for_and_the_shapes_of_their_kind():
    sums = KroneckerAccumulator(LAYER, Kronecker, torch.ones((), dtype=torch.float16)).sums
    assert {name: tuple(tensor.shape) for name, tensor in sums.items()} == {
        "row_factor": (5, 5),
        "column_factor": (4, 4),
    }
    assert {tensor.dtype for tensor in sums.values()} == {torch.float16}
    assert not any(tensor.any() for tensor in sums.values())


def test_a_curvature_is_an_average_over_samples_of_all_processes():
    accumulator = DiagonalAccumulator(LAYER, Diagonal, torch.ones(()))
    accumulator.add_gradients(torch.ones(2, 5, 4))
    reduced = {name: 3 * tensor for name, tensor in accumulator.sums.items()}
    assert torch.equal(accumulator.finish(reduced, 6).values, torch.ones(5, 4))
    with pytest.raises(ValueError, match="values"):
        accumulator.finish({}, 6)
