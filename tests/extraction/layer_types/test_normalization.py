import pytest
import torch
from helpers.layer_calls import check_gradients, draw
from torch.nn import functional as F

from lightning_fedfisher.errors import UnsupportedModelError
from lightning_fedfisher.extraction.layer_types.normalization import read_batch_norm


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 4, 5, 2)])
def test_batch_norm_with_running_statistics(shape):
    x, mean, variance = draw(*shape), draw(4, seed=1), draw(4, seed=2).square() + 0.1
    weight, bias = draw(4, seed=4), draw(4, seed=5)
    args = (x, mean, variance, weight, bias)
    check_gradients(F.batch_norm, args, [weight, bias])
    check_gradients(F.batch_norm, args, [bias], lone=True)
    check_gradients(F.batch_norm, (x, mean, variance, weight), [weight])


def test_batch_norm_by_the_batch_is_refused():
    with pytest.raises(UnsupportedModelError, match="keep running statistics"):
        read_batch_norm(torch.ones(2, 3), None, None, training=True)


@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4)])
def test_layer_norm_and_rms_norm_scale_the_last_dimension(shape):
    x, weight, bias = draw(*shape), draw(4, seed=1), draw(4, seed=2)
    check_gradients(F.layer_norm, (x, [4], weight, bias), [weight, bias])
    check_gradients(F.layer_norm, (x, [4], weight), [weight])
    check_gradients(F.rms_norm, (x, [4], weight), [weight])


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5)])
def test_group_norm_scales_channels(shape):
    x, weight, bias = draw(*shape), draw(4, seed=1), draw(4, seed=2)
    check_gradients(F.group_norm, (x, 2, weight, bias), [weight, bias])
