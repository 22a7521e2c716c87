import torch
from helpers.layer_calls import draw, sorted_rows

from lightning_fedfisher.extraction.layer_types.scale_shift import ScaleShift, lone_bias


def test_a_scale_and_a_shift_are_two_columns():
    x, g = draw(3, 4, 5), draw(2, 3, 4, 5, seed=1)
    found = ScaleShift(lambda x: x, True, (4,), trailing=False).per_sample_gradients(x, g, 3)
    scale, shift = (g * x).sum(3), g.sum(3)
    expected = torch.stack([scale, shift], dim=3).flatten(0, 1)
    torch.testing.assert_close(sorted_rows(found), sorted_rows(expected))


def test_features_may_be_last_and_have_several_dimensions():
    g = draw(1, 3, 2, 4, 5)
    layer = ScaleShift(None, True, (4, 5), trailing=True)
    found = layer.per_sample_gradients(draw(3, 2, 4, 5), g, 3)
    torch.testing.assert_close(found, g[0].sum(1))
    assert layer.sample_axes(4) == 2


def test_a_bias_alone_is_a_shift():
    assert lone_bias(None, trailing=True) is None
    assert lone_bias(torch.ones(3), trailing=True) == ScaleShift(None, True, (3,), True)
