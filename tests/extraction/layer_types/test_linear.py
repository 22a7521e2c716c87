import pytest
import torch
from helpers.layer_calls import check_gradients, draw
from torch.nn import functional as F

from lightning_fedfisher.extraction.layer_types.linear import Linear, read_linear


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4), (3, 2, 5, 4), (6, 4)])
def test_gradients_are_those_of_autograd(shape, directions):
    x, weight, bias = draw(*shape), draw(5, 4, seed=1), draw(5, seed=2)
    check_gradients(F.linear, (x, weight), [weight], directions=directions)
    check_gradients(F.linear, (x, weight, bias), [weight, bias], directions=directions)
    check_gradients(F.linear, (x, weight, bias), [bias], lone=True, directions=directions)


def test_one_position_a_sample_is_an_outer_product_and_several_are_none():
    layer = Linear(has_bias=False)
    assert layer.is_outer_product(torch.ones(3, 4), 3)
    assert layer.is_outer_product(torch.ones(3, 1, 4), 3)
    assert not layer.is_outer_product(torch.ones(3, 2, 4), 3)
    assert not layer.is_outer_product(torch.ones(6, 4), 3)


def test_features_are_last_and_samples_anywhere_before():
    layer = Linear(has_bias=False)
    assert (layer.channel_axis(2), layer.channel_axis(4)) == (1, 3)
    assert (layer.sample_axes(2), layer.sample_axes(4)) == (1, 3)
    assert layer.count_positions(torch.ones(3, 5, 4), torch.ones(3, 5, 2)) == 15


def test_a_vector_for_a_weight_is_not_known():
    assert read_linear(torch.ones(3, 4), torch.ones(4)) is None
