import pytest
import torch
from helpers.layer_calls import draw, make_call
from torch.nn import functional as F

from lightning_fedfisher.curvature import EmbeddingKronecker, Kronecker
from lightning_fedfisher.extraction.accumulators.spectrum import SpectrumAccumulator


def _factor(size, seed):
    root = draw(size, size, seed=seed)
    return root @ root.T


TOKENS = torch.tensor([[0, 2, 2, 3], [1, 1, 1, 1], [4, 0, 3, 4]])


@pytest.mark.parametrize(
    ("func", "args", "factors"),
    [
        (F.linear, (draw(3, 2, 4), draw(5, 4)), Kronecker(_factor(5, 1), _factor(4, 2))),
        (
            F.embedding,
            (TOKENS, draw(5, 4)),
            EmbeddingKronecker(draw(5).square(), _factor(4, 2)),
        ),
    ],
)
def test_eigenvalues_are_second_moments_in_the_eigenbasis(func, args, factors):
    basis = factors.eigendecompose()
    call = make_call(func, args, {}, has_bias=False)
    gradients = call.layer_type.per_sample_gradients(call.inputs, call.gradients, 3)
    expected = basis.to_eigenbasis(gradients).square().sum(0) / 3
    for add in ("calls", "gradients"):
        accumulator = SpectrumAccumulator(basis)
        if add == "calls":
            accumulator.add([call], 3)
        else:
            accumulator.add_gradients(gradients)
        block = accumulator.finish(accumulator.sums, 3)
        assert type(block) is type(basis)
        torch.testing.assert_close(block.spectrum, expected)
        assert torch.equal(block.column_basis, basis.column_basis)
