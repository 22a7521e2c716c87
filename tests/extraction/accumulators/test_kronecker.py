import torch
from helpers.layer_calls import draw, make_call
from torch.nn import functional as F

from lightning_fedfisher.curvature import KINDS
from lightning_fedfisher.extraction.accumulators.kronecker import KroneckerAccumulator
from lightning_fedfisher.layers import Layer


def _accumulate(kind, calls, samples, shape):
    layer = Layer("layer", (("layer.weight", shape),))
    accumulator = KroneckerAccumulator(layer, KINDS[kind], calls[0].inputs)
    accumulator.add(calls, samples)
    return accumulator.sums


def test_inputs_are_averaged_over_positions_and_gradients_summed():
    x, weight = draw(3, 6, 4), draw(5, 4, seed=1)
    call = make_call(F.linear, (x, weight), {}, has_bias=False)
    sums = _accumulate("kronecker", [call], 3, (5, 4))
    torch.testing.assert_close(sums["column_factor"], torch.einsum("spi,spj->ij", x, x) / 6)
    g = call.gradients
    torch.testing.assert_close(sums["row_factor"], torch.einsum("dspi,dspj->ij", g, g))


def test_several_calls_share_the_average_over_positions():
    x, weight = draw(3, 6, 4), draw(5, 4, seed=1)
    call = make_call(F.linear, (x, weight), {}, has_bias=False)
    one = _accumulate("kronecker", [call], 3, (5, 4))
    two = _accumulate("kronecker", [call, call], 3, (5, 4))
    torch.testing.assert_close(two["column_factor"], one["column_factor"])
    torch.testing.assert_close(two["row_factor"], 2 * one["row_factor"])


def test_inputs_of_a_transposed_convolution_are_on_the_rows():
    x, weight = draw(3, 2, 5), draw(2, 3, 2, seed=1)
    call = make_call(F.conv_transpose1d, (x, weight), {}, has_bias=False)
    sums = _accumulate("transposed_kronecker", [call], 3, (2, 6))
    torch.testing.assert_close(sums["row_factor"], torch.einsum("sip,sjp->ij", x, x) / 5)
    patches = call.gradients.flatten(0, 1).unfold(2, 2, 1).transpose(1, 2).flatten(2)
    expected = torch.einsum("npi,npj->ij", patches, patches)
    torch.testing.assert_close(sums["column_factor"], expected)
