import pytest
import torch
from helpers.layer_calls import check_gradients, draw
from torch import Tensor

from lightning_fedfisher.extraction.layer_types.registry import read_call
from lightning_fedfisher.extraction.layer_types.transposed_linear import TransposedLinear


@pytest.mark.parametrize("positions", [(), (4,), (2, 4)])
def test_gradients_are_those_of_autograd(positions):
    weight = draw(5, 2, seed=1)
    kind = check_gradients(torch.matmul, (draw(3, *positions, 5), weight), [weight])
    assert isinstance(kind, TransposedLinear)


def test_its_inputs_are_on_the_rows():
    layer = TransposedLinear()
    assert layer.inputs_are_rows
    assert (layer.kind, layer.channel_axis(3)) == ("transposed_kronecker", None)
    assert (layer.sample_axes(2), layer.sample_axes(3)) == (1, 2)
    assert layer.count_positions(torch.ones(5, 4, 3), torch.ones(5, 4, 7)) == 20


PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


@pytest.mark.parametrize("func", PRODUCTS)
def test_products_with_a_matrix_on_the_right_are_read(func):
    inputs, weight = torch.ones(2, 3), torch.ones(3, 4)
    call = read_call(func, (inputs, weight), {})
    assert call.inputs is inputs
    assert call.weight is weight
    assert call.bias is call.bias_type is None
    assert read_call(func, (torch.ones(3), weight), {}) is None
    assert read_call(func, (inputs, torch.ones(3)), {}) is None
    assert read_call(func, (torch.ones(5, 2, 3), torch.ones(5, 3, 4)), {}) is None
    assert read_call(func, (inputs, None), {}) is None
    assert read_call(func, (inputs,), {"other": weight}) is None


@pytest.mark.parametrize("func", [torch.addmm, Tensor.addmm])
def test_what_is_added_to_a_product_is_a_bias_if_it_is_a_vector(func):
    inputs, weight, bias = torch.ones(2, 3), torch.ones(3, 4), torch.ones(4)
    call = read_call(func, (bias, inputs, weight), {})
    assert call.inputs is inputs
    assert call.weight is weight
    assert call.bias is bias
    assert (call.bias_type.features, call.bias_type.trailing) == ((4,), True)
    assert read_call(func, (bias, inputs, weight), {"beta": 0.5}) is None
    assert read_call(func, (torch.ones(2, 4), inputs, weight), {}) is None
    assert read_call(func, (torch.ones(1), inputs, weight), {}) is None
    assert read_call(func, (bias,), {"mat1": inputs, "mat2": weight}) is None
