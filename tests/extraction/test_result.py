"""What an extraction says about itself."""

import dataclasses

import pytest
import torch
from torch import nn

from lightning_fedfisher.extraction import extract_curvature


@pytest.fixture
def found():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    return extract_curvature(model, [(torch.eye(3), torch.tensor([0, 1, 0]))])


def test_the_header_tells_what_was_extracted(found):
    header = found.header(100, {"site": "a"})
    assert (header.num_samples, header.curvature_samples) == (100, 3)
    assert (header.curvature, header.fisher) == ("kfac", "normalised")
    assert header.likelihood == "categorical"
    assert header.layers == found.layers
    assert header.kinds == {"0": "kronecker", "2": "kronecker"}
    assert header.metadata == {"site": "a"}
    assert header.output_layer == "2"
    assert header.fed_by["2"].layer == "0"
    # Without the number of samples, what the loader counts; a list counts nothing.
    assert found.header().num_samples == 0
    assert dataclasses.replace(found, population=7).header().num_samples == 7


def test_the_report_tells_of_the_output_layer(found):
    assert found.report.splitlines()[-1] == "output layer: 2"
    without = dataclasses.replace(found, output_layer="")
    assert without.report.splitlines()[-1] == "no output layer: the logits are no layer's outputs"


def test_parameter_names_are_in_the_order_of_the_layers(found):
    assert found.parameter_names == ("0.weight", "0.bias", "2.weight", "2.bias")
