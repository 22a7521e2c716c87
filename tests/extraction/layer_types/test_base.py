import torch
from helpers.layer_calls import draw

from lightning_fedfisher.extraction.layer_types.base import (
    LayerType,
    append_ones,
    flatten_positions,
)
from lightning_fedfisher.extraction.layer_types.linear import Linear


class _Other(LayerType):
    def per_sample_gradients(self, inputs, gradients, samples):
        return gradients


def test_a_layer_type_that_says_nothing_gets_a_diagonal_and_passes_nothing_on():
    layer = _Other()
    assert (layer.kind, layer.sample_axes(4), layer.channel_axis(4)) == ("diagonal", 1, None)
    assert not layer.is_outer_product(torch.ones(2, 3), 2)
    assert layer.peak_numel(torch.ones(2, 3), torch.ones(2, 2, 5)) == 20


def test_both_sides_are_by_sample_with_directions_stacked():
    inputs, gradients = draw(3, 5, 4), draw(2, 3, 5, 6, seed=1)
    seen, given = Linear(has_bias=False).unfold_both(inputs, gradients, 3)
    torch.testing.assert_close(seen, inputs.mT)
    torch.testing.assert_close(given.view(3, 2, 6, 5), gradients.permute(1, 0, 3, 2))


def test_ones_are_appended_along_one_dimension():
    assert append_ones(torch.zeros(2, 1), 1).tolist() == [[0, 1], [0, 1]]
    assert append_ones(torch.zeros(1, 2), 0).tolist() == [[0, 0], [1, 1]]


def test_frames_become_positions_of_their_sample():
    image = torch.arange(4.0).view(4, 1, 1)  # two samples of two frames
    assert flatten_positions(image, 2).tolist() == [[[0, 1]], [[2, 3]]]
    assert flatten_positions(draw(4, 3, 2, 2), 4).shape == (4, 3, 4)
