import pytest
import torch
from helpers.layer_calls import check_gradients, draw
from torch.nn import functional as F

from lightning_fedfisher.extraction.layer_types.transposed_convolution import (
    TransposedConvolution,
    read_transposed_convolution,
)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"stride": 3, "output_padding": 2},
        {"dilation": 2, "padding": 3},
        {"stride": 2, "output_padding": 2, "dilation": 3},
    ],
)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_gradients_are_those_of_autograd(dimensions, options):
    func = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dimensions - 1]
    x, weight = draw(3, 2, *[4] * dimensions), draw(2, 3, *[3] * dimensions, seed=1)
    bias = draw(3, seed=2)
    kind = check_gradients(func, (x, weight), [weight], **options)
    assert isinstance(kind, TransposedConvolution)
    check_gradients(func, (x, weight, bias), [weight], **options)
    check_gradients(func, (x, weight, bias), [bias], lone=True, **options)


def test_its_inputs_are_on_the_rows():
    call = read_transposed_convolution(torch.ones(1, 2, 4), torch.ones(2, 3, 2))
    layer = call.weight_type(False)
    assert layer.inputs_are_rows
    assert (layer.kind, layer.channel_axis(3)) == ("transposed_kronecker", None)
    assert layer.count_positions(torch.ones(5, 2, 4), torch.ones(5, 3, 5)) == 20


def test_groups_are_known_for_their_bias_alone():
    x, weight, bias = torch.ones(1, 2, 4), torch.ones(2, 1, 2), torch.ones(2)
    call = read_transposed_convolution(x, weight, bias, groups=2)
    assert call.weight_type is None
    assert call.bias_type is not None
    assert read_transposed_convolution(torch.ones(2, 4), torch.ones(2, 3, 2)) is None
