import torch
from helpers.layer_calls import draw, make_call
from torch.nn import functional as F

from lightning_fedfisher.curvature import EmbeddingKronecker
from lightning_fedfisher.extraction.accumulators.embedding import EmbeddingAccumulator
from lightning_fedfisher.layers import Layer


def test_tokens_are_counted_once_and_gradients_in_all_directions():
    tokens = torch.tensor([[0, 2, 2, 3], [1, 1, 1, 1]])
    call = make_call(F.embedding, (tokens, draw(4, 3)), {"padding_idx": 3}, has_bias=False)
    layer = Layer("embed", (("embed.weight", (4, 3)),))
    accumulator = EmbeddingAccumulator(layer, EmbeddingKronecker, call.gradients)
    accumulator.add([call], 2)
    counts = torch.tensor([1, 4, 2, 0], dtype=torch.float64)  # without padding
    torch.testing.assert_close(accumulator.sums["row_values"], counts / 4)
    read = call.gradients[:, tokens != 3]
    expected = torch.einsum("dpi,dpj->ij", read, read)
    torch.testing.assert_close(accumulator.sums["column_factor"], expected)
