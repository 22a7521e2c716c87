import torch
from helpers.layer_calls import draw, make_call
from torch.nn import functional as F

from lightning_fedfisher.curvature import Diagonal
from lightning_fedfisher.extraction.accumulators.diagonal import DiagonalAccumulator
from lightning_fedfisher.layers import Layer


def test_calls_and_written_out_gradients_give_the_same():
    layer = Layer("layer", (("layer.weight", (5, 4)),))
    call = make_call(F.linear, (draw(3, 2, 4), draw(5, 4, seed=1)), {}, has_bias=False)
    gradients = call.layer_type.per_sample_gradients(call.inputs, call.gradients, 3)
    for add in ("calls", "gradients"):
        accumulator = DiagonalAccumulator(layer, Diagonal, call.inputs)
        if add == "calls":
            accumulator.add([call], 3)
        else:
            accumulator.add_gradients(gradients)
        block = accumulator.finish(accumulator.sums, 3)
        torch.testing.assert_close(block.values, gradients.square().sum(0) / 3)
