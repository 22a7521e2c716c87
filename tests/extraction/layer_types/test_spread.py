import torch
from torch import nn

from lightning_fedfisher.extraction.layer_types.spread import Spread


def test_directions_and_frames_are_told_apart():
    parameter = nn.Parameter(torch.randn(4, dtype=torch.float64))
    layer = Spread(parameter, torch.exp, start=1, columns=3)
    gradients = torch.randn(2, 3 * 5, 7, 4, dtype=torch.float64)
    found = layer.per_sample_gradients(torch.zeros(15, 7, 4), gradients, samples=3)
    expected = gradients.view(2, 3, 5 * 7, 4).sum(2) * parameter.detach().exp()
    assert found.shape == (6, 4, 3)
    torch.testing.assert_close(found[:, :, 1], expected.flatten(0, 1))
    assert not found[:, :, ::2].any()
