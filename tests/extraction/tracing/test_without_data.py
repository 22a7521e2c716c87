"""What layers compute, without data: the same as an extraction finds with them."""

import pytest
import torch
from helpers.networks import NETS, USED_OTHERWISE, build_net, every_net, extract, make_data
from torch import nn

from lightning_fedfisher.extraction.layer_report import block_kind
from lightning_fedfisher.extraction.tracing.without_data import types_by_modules, types_by_running
from lightning_fedfisher.layers import find_layers

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def _kinds(types, layers):
    return {layer.name: block_kind("kfac", types.get(layer.name)) for layer in layers}


@every_net
def test_the_kinds_are_those_of_an_extraction(net):
    model, shape = build_net(net), NETS[net][1]
    layers = find_layers(model)
    expected = {
        report.layer.name: report.kind
        for report in extract(model, make_data(shape), "kfac").layer_reports
    }
    before = {name: p.clone() for name, p in model.named_parameters()}
    ran = _kinds(
        types_by_running(model, layers, lambda m: m(torch.zeros(2, *shape).double())), layers
    )
    by_modules = _kinds(types_by_modules(model, layers), layers)
    # Used as a layer, and once more in another way; or the samples cannot be told apart.
    otherwise = USED_OTHERWISE.get(net, set())
    for found in (ran, by_modules):
        assert {name for name in found if found[name] != expected[name]} <= otherwise
    if net == "standardised":  # by an operation that is not known: seen by running alone
        assert ran == expected
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_a_model_that_needs_values_is_told_by_its_modules():
    class Choosy(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    model = Choosy(2, 2)
    layers = find_layers(model)
    with pytest.raises(ValueError, match="leave `forward` out"):
        types_by_running(model, layers, lambda m: m(torch.zeros(1, 2)))
    assert _kinds(types_by_modules(model, layers), layers) == {"weight": "kronecker"}


def test_no_weight_is_copied():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(10**6, 10**6), nn.BatchNorm1d(10**6))
    layers = find_layers(model)
    found = types_by_running(model, layers, lambda m: m(torch.zeros(2, 10**6)))
    assert _kinds(found, layers) == _kinds(types_by_modules(model, layers), layers)
    assert _kinds(found, layers)["0"] == "kronecker"
