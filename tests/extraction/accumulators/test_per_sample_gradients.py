import torch
from helpers.layer_calls import draw, make_call, reference_gradients, sorted_rows
from torch.nn import functional as F

from lightning_fedfisher.extraction.accumulators import per_sample_gradients as module
from lightning_fedfisher.extraction.accumulators.per_sample_gradients import (
    in_chunks,
    is_outer_product,
    materialized_gradients,
)


def _linear(*shape, directions=1):
    args = draw(*shape), draw(5, shape[-1], seed=1)
    return args, make_call(F.linear, args, {}, has_bias=False, directions=directions)


def test_chunks_are_all_samples_in_order(monkeypatch):
    _, call = _linear(5, 3, 4)
    monkeypatch.setattr(module, "_CHUNK_NUMEL", 2 * 15)  # the gradients of two samples
    chunks = list(in_chunks([call, call], 5))
    assert [n for _, n in chunks] == [1] * 5
    chunks = list(in_chunks([call], 5))
    assert [n for _, n in chunks] == [2, 2, 1]
    assert torch.equal(torch.cat([part.inputs for (part,), _ in chunks]), call.inputs)
    assert [n for _, n in in_chunks([call], 5, entries_per_gradient=30)] == [1] * 5


def test_several_calls_of_vectors_are_no_outer_product():
    _, call = _linear(3, 4)
    assert is_outer_product([call], 3)
    assert not is_outer_product([call, call], 3)
    assert not is_outer_product([_linear(3, 2, 4)[1]], 3)


def test_gradients_are_written_out_where_that_pays():
    args, call = _linear(3, 20, 4)  # more positions than rows
    (found,) = materialized_gradients([call], 3, (5, 4))
    expected = reference_gradients(F.linear, args, {}, [args[1]], call.gradients, 3)
    torch.testing.assert_close(sorted_rows(found), sorted_rows(expected))


def test_gradients_are_not_written_out_where_it_does_not():
    assert materialized_gradients([_linear(3, 4)[1]], 3, (5, 4)) is None  # vectors
    assert materialized_gradients([_linear(3, 4, 4)[1]], 3, (5, 4)) is None  # few positions
    large = _linear(3, 6, 400)[1]
    assert materialized_gradients([large], 3, (5, 400 * 60)) is None  # much larger than the call
    table = torch.tensor([[0, 1]]), draw(3, 2)
    call = make_call(F.embedding, table, {}, has_bias=False)
    assert materialized_gradients([call], 1, (3, 2)) is None
