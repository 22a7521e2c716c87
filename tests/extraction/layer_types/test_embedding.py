import pytest
import torch
from helpers.layer_calls import check_gradients, draw, make_call, reference_gradients
from torch.nn import functional as F

from lightning_fedfisher.extraction.layer_types.embedding import read_embedding

TOKENS = torch.tensor([[0, 2, 2, 5], [1, 1, 1, 1], [4, 0, 3, 5]])


@pytest.mark.parametrize("padding", [None, 1, -1])
@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[:, 0], TOKENS.view(3, 2, 2)])
def test_gradients_are_those_of_autograd(tokens, padding):
    weight = draw(6, 2)
    check_gradients(F.embedding, (tokens, weight), [weight], padding_idx=padding)


def test_rows_of_a_sample_and_direction_add_up_to_its_gradient():
    weight = draw(6, 2)
    call = make_call(F.embedding, (TOKENS, weight), {"padding_idx": 2}, has_bias=False)
    owners, tokens, rows = call.layer_type.nonzero_rows(call.inputs, call.gradients, 3)
    assert 2 not in tokens
    whole = torch.zeros(6, 6, 2, dtype=torch.float64).index_put_((owners, tokens), rows, True)
    gradients = reference_gradients(
        F.embedding, (TOKENS, weight), {"padding_idx": 2}, [weight], call.gradients, 3
    )
    by_direction = gradients.view(3, 2, 6, 2).transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(whole, by_direction)


def test_a_weight_that_changes_during_the_call_is_not_known():
    assert read_embedding(TOKENS, torch.ones(6, 2), max_norm=1.0) is None
