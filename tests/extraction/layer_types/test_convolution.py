import pytest
import torch
from helpers.layer_calls import check_gradients, draw
from torch.nn import functional as F

from lightning_fedfisher.extraction.layer_types.conv_geometry import ConvGeometry
from lightning_fedfisher.extraction.layer_types.convolution import (
    Convolution,
    GroupedConvolution,
    read_convolution,
)

OPTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
    {"padding": "valid"},
    {"stride": 3, "padding": 2, "dilation": 2},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_gradients_are_those_of_autograd(dimensions, groups, options):
    if options.get("padding") == "same" and "stride" in options:
        pytest.skip("torch does not know it")
    func = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1]
    x, weight = draw(3, 2, *[6] * dimensions), draw(4, 2 // groups, *[2] * dimensions, seed=1)
    bias = draw(4, seed=2)
    kind = check_gradients(func, (x, weight), [weight], groups=groups, **options)
    assert isinstance(kind, Convolution if groups == 1 else GroupedConvolution)
    check_gradients(func, (x, weight, bias), [weight, bias], groups=groups, **options)
    check_gradients(func, (x, weight, bias), [bias], lone=True, groups=groups, **options)


def test_frames_of_a_sample_are_positions():
    x, weight = draw(6, 2, 4, 4), draw(3, 2, 2, 2, seed=1)
    check_gradients(F.conv2d, (x, weight), [weight], samples=3)


def test_groups_have_no_kronecker_factors_and_say_so():
    call = read_convolution(torch.ones(1, 2, 4), torch.ones(2, 1, 2), groups=2)
    layer = call.weight_type(False)
    assert (layer.kind, layer.title) == ("diagonal", "a grouped convolution")
    assert layer.channel_axis(3) is None


@pytest.mark.parametrize(("size", "few"), [(3, True), (12, False)])
@pytest.mark.parametrize("samples", [3, 6])
def test_filters_of_single_channels_are_correlated_where_images_are_small(
    size, few, samples, monkeypatch
):
    correlated, original = [], ConvGeometry.correlate
    monkeypatch.setattr(
        ConvGeometry, "correlate", lambda *args: (correlated.append(1), original(*args))[1]
    )
    x, weight, bias = draw(6, 4, size, size), draw(4, 1, 3, 3, seed=1), draw(4, seed=2)
    parts = [weight, bias]
    check_gradients(F.conv2d, (x, weight, bias), parts, samples=samples, groups=4, padding=1)
    assert bool(correlated) == few


def test_an_image_without_a_batch_is_not_known():
    assert read_convolution(torch.ones(2, 4), torch.ones(3, 2, 2)) is None


def test_its_patches_are_the_largest_intermediate_tensor():
    call = read_convolution(torch.ones(1, 2, 8, 8), torch.ones(3, 2, 4, 4), stride=2)
    layer = call.weight_type(False)
    assert layer.peak_numel(torch.ones(1, 2, 8, 8), torch.ones(1, 1, 3, 3, 3)) == 2 * 64 * 4
