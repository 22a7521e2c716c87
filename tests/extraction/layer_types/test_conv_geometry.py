import pytest
import torch
from helpers.layer_calls import draw
from torch.nn import functional as F

from lightning_fedfisher.extraction.layer_types.conv_geometry import ConvGeometry


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((2, 3), 1, 0, 1),
        ((3, 2), (2, 3), (0, 1), 1),
        ((2, 2), 2, 1, (2, 3)),
        ((1, 4), 1, (0, 2), 2),
    ],
)
def test_patches_are_those_of_torch(kernel, stride, padding, dilation):
    image = draw(3, 2, 8, 9)
    geometry = ConvGeometry.from_arguments(kernel, stride, padding, dilation)
    expected = F.unfold(image, kernel, dilation, padding, stride)
    torch.testing.assert_close(geometry.unfold(image).transpose(0, 1), expected)


def test_words_for_a_padding_are_zeros_before_and_after():
    same = ConvGeometry.from_arguments((2, 3, 4), 1, "same", (1, 2, 3))
    assert same.padding == ((0, 1), (2, 2), (4, 5))
    assert ConvGeometry.from_arguments((2, 3), 1, "valid", 1).padding == ((0, 0), (0, 0))


def test_numbers_are_written_out_for_every_dimension():
    assert ConvGeometry.from_arguments([2, 2], [3], 1, (1, 2)) == ConvGeometry(
        (2, 2), (3, 3), ((1, 1), (1, 1)), (1, 2)
    )


def test_overlap_is_at_least_one():
    assert ConvGeometry.from_arguments((4, 4), 2, 0, 1).overlap == 4
    assert ConvGeometry.from_arguments((1, 1), 3, 0, 1).overlap == 1


@pytest.mark.parametrize(
    ("sizes", "kernel", "stride", "padding", "dilation"),
    [
        ((9,), (4,), 2, 0, 2),
        ((8, 9), (3, 3), 1, 1, 1),
        ((2, 2), (7, 7), 1, 3, 1),  # most elements meet padding alone
        ((2, 3), (4, 5), 1, "same", 1),
        ((7, 8), (2, 3), (2, 3), (0, 1), 1),
        ((9, 6), (3, 2), 2, (4, 1), (2, 3)),
        ((5, 3, 4), (2, 3, 1), (1, 2, 1), 1, 1),
    ],
)
def test_the_gradient_of_every_channels_own_filter_is_that_of_autograd(
    sizes, kernel, stride, padding, dilation
):
    channels = draw(6, *sizes).double()
    filters = torch.zeros(6, 1, *kernel, dtype=torch.float64, requires_grad=True)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(sizes)]
    output = convolve(channels.unsqueeze(0), filters, None, stride, padding, dilation, groups=6)
    gradients = draw(*output.shape, seed=1).double()
    (expected,) = torch.autograd.grad(output, filters, gradients)
    geometry = ConvGeometry.from_arguments(kernel, stride, padding, dilation)
    found = geometry.correlate(channels, gradients.squeeze(0))
    torch.testing.assert_close(found, expected.squeeze(1), rtol=1e-12, atol=1e-12)
    assert float(expected.norm()) > 0.1
