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
