"""Large patches are taken apart into channels and kernel."""

import pytest
import torch
from helpers.networks import extract, make_data
from torch import nn

from lightning_fedfisher.extraction.layer_types import convolution as convolutions


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_large_patch_is_taken_apart_into_channels_and_kernel(monkeypatch, has_bias):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=has_bias), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )
    model, data = model.double(), make_data((3, 4, 4), 7)
    whole = extract(model, data, fisher="exact").blocks["0"]
    monkeypatch.setattr(convolutions, "_LARGEST_PATCH", 26)
    extracted = extract(model, data, fisher="exact")
    found = extracted.blocks["0"]
    assert found.kind == "convolution_kronecker"
    assert "convolution_kronecker (hooks): 1 layer" in extracted.report
    # By the definition: the partial traces of the factor over whole patches.
    patches = whole.column_factor[:27, :27].reshape(3, 9, 3, 9)
    channels = torch.einsum("ckdk->cd", patches) / 9
    kernel = torch.einsum("ckcl->kl", patches)
    torch.testing.assert_close(found.channel_factor, channels)
    torch.testing.assert_close(found.kernel_factor, kernel / kernel.diagonal().mean())
    torch.testing.assert_close(found.row_factor, whole.row_factor)
    torch.testing.assert_close(found.trace(), whole.trace())
    assert found.has_bias == has_bias
    assert extract(model, data, "ekfac", fisher="exact").blocks["0"].kind == "ekfac"


def test_a_patch_of_inputs_that_are_always_zero_has_no_kernel_factor(monkeypatch):
    monkeypatch.setattr(convolutions, "_LARGEST_PATCH", 1)
    model = nn.Sequential(nn.Conv2d(2, 3, 2, bias=False), nn.Flatten()).double()
    data = make_data((2, 2, 2), 5)
    zeros = torch.utils.data.TensorDataset(torch.zeros_like(data.tensors[0]), data.tensors[1])
    block = extract(model, zeros).blocks["0"]
    assert not block.channel_factor.any()
    assert not block.kernel_factor.any()
