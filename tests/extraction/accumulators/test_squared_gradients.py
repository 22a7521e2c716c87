import pytest
import torch
from helpers.layer_calls import draw, make_call, reference_gradients
from torch.nn import functional as F

from lightning_fedfisher.extraction.accumulators import per_sample_gradients, squared_gradients
from lightning_fedfisher.extraction.accumulators.squared_gradients import (
    add_squared_gradients,
    sum_of_squares,
)

TOKENS = torch.tensor([[0, 2, 2, 5], [1, 1, 1, 1], [4, 0, 3, 5]])
# One of each way: rows, outer products, products (with few and with many positions, and with
# inputs on the rows), and gradients written out.
CALLS = {
    "embedding": (F.embedding, (TOKENS, draw(6, 2)), {}),
    "vectors": (F.linear, (draw(3, 4), draw(5, 4, seed=1)), {}),
    "few positions": (F.linear, (draw(3, 2, 4), draw(5, 4, seed=1)), {}),
    "many positions": (F.linear, (draw(3, 30, 4), draw(5, 4, seed=1)), {}),
    "convolution": (F.conv2d, (draw(3, 2, 5, 5), draw(4, 2, 3, 3, seed=1)), {}),
    "transposed": (F.conv_transpose1d, (draw(3, 2, 5), draw(2, 3, 2, seed=1)), {}),
    "few transposed": (F.conv_transpose1d, (draw(3, 9, 1), draw(9, 3, 2, seed=1)), {}),
    "grouped": (F.conv1d, (draw(3, 4, 5), draw(6, 2, 2, seed=1)), {"groups": 2}),
}


def _basis(size, seed):
    return torch.linalg.qr(draw(size, size, seed=seed)).Q


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("bases", [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("name", CALLS)
def test_squares_are_those_of_written_out_gradients(name, bases, small, monkeypatch):
    if small:  # chunks of one sample, and gradients added one by one
        monkeypatch.setattr(per_sample_gradients, "_CHUNK_NUMEL", 1)
        monkeypatch.setattr(squared_gradients, "_CACHE_NUMEL", 1)
        monkeypatch.setattr(squared_gradients, "_LONG_GRADIENT", 1)
    func, args, kwargs = CALLS[name]
    if name == "embedding" and bases[0]:
        pytest.skip("an embedding has no basis over tokens")
    calls = [make_call(func, args, kwargs, has_bias=False)]
    gradients = reference_gradients(func, args, kwargs, [args[1]], calls[0].gradients, 3)
    _, rows, columns = gradients.shape
    row_basis = _basis(rows, 4) if bases[0] else None
    column_basis = _basis(columns, 5) if bases[1] else None
    if row_basis is not None:
        gradients = row_basis.T @ gradients
    if column_basis is not None:
        gradients = gradients @ column_basis
    sums = torch.ones(rows, columns, dtype=torch.float64)  # which are added to
    add_squared_gradients(sums, calls, 3, row_basis, column_basis)
    torch.testing.assert_close(sums - 1, gradients.square().sum(0))


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_added_before_they_are_squared(name):
    func, args, kwargs = CALLS[name]
    calls = [make_call(func, args, kwargs, has_bias=False) for _ in range(2)]
    gradients = reference_gradients(func, args, kwargs, [args[1]], calls[0].gradients, 3)
    sums = torch.zeros(gradients.shape[1:], dtype=torch.float64)
    add_squared_gradients(sums, calls, 3)
    torch.testing.assert_close(sums, (2 * gradients).square().sum(0))


@pytest.mark.parametrize("entries", [4, squared_gradients._LONG_GRADIENT])
def test_long_gradients_are_squared_one_by_one(entries):
    gradients = draw(3, 2, entries // 2)
    torch.testing.assert_close(sum_of_squares(gradients), gradients.square().sum(0))
