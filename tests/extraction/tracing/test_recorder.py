import pytest
import torch
from helpers.layer_calls import draw
from torch import nn
from torch.nn import functional as F

from lightning_fedfisher.extraction.layer_types.linear import Linear
from lightning_fedfisher.extraction.tracing.recorder import (
    LayerCall,
    LayerCallRecorder,
    edges_to_leaves,
)
from lightning_fedfisher.layers import find_layers


def _record(model, forward):
    """Layers of each call, and names of all other functions."""
    calls, others = [], []

    def on_layer_call(call):
        calls.append((call.layer_names, [kind for _, kind in call.layers]))
        return call.run()

    def on_other_call(func, args, kwargs):
        others.append(getattr(func, "__name__", ""))
        return func(*args, **kwargs)

    with LayerCallRecorder(model, find_layers(model), on_layer_call, on_other_call):
        forward()
    return calls, others


def test_calls_of_layers_and_of_other_functions_are_told_apart():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    calls, others = _record(model, lambda: model(torch.ones(1, 2)))
    assert calls == [(("0",), [Linear(has_bias=True)])]
    assert "relu" in others


def test_weight_and_bias_of_different_layers_are_two_layers_of_one_call():
    first, second = nn.Linear(2, 3, bias=False), nn.Linear(4, 3)
    model = nn.ModuleList([first, second])
    second.weight.requires_grad_(False)
    calls, _ = _record(model, lambda: F.linear(torch.ones(1, 2), first.weight, second.bias))
    assert [names for names, _ in calls] == [("0", "1.bias")]


def test_half_a_layer_and_calls_without_gradients_are_no_calls_of_it():
    model = nn.Linear(2, 3)
    assert _record(model, lambda: F.linear(torch.ones(1, 2), model.weight))[0] == []
    with torch.no_grad():
        assert _record(model, lambda: model(torch.ones(1, 2)))[0] == []


def test_attention_is_the_linear_maps_inside():
    model = nn.MultiheadAttention(4, 2)
    x = torch.ones(3, 1, 4)
    calls, _ = _record(model, lambda: model(x, x, x))
    assert [names for names, _ in calls] == [("in_proj_weight",), ("out_proj",)]


def test_arguments_are_replaced_by_position_and_by_name():
    model, swap = nn.Linear(2, 3), torch.zeros(3, 2)

    def on_layer_call(call):
        return call.run(lambda argument: swap if argument is model.weight else argument)

    with LayerCallRecorder(model, find_layers(model), on_layer_call):
        by_place = F.linear(torch.ones(1, 2), model.weight, model.bias)
        by_name = F.linear(torch.ones(1, 2), weight=model.weight, bias=model.bias)
    assert torch.equal(by_place[0], model.bias)
    assert torch.equal(by_name[0], model.bias)


def test_some_samples_of_a_call_have_their_frames_and_all_directions():
    call = LayerCall(Linear(has_bias=False), draw(6, 2), draw(2, 6, 3))
    part = call.select(1, 3, samples=3)  # of two frames each
    assert torch.equal(part.inputs, call.inputs[2:])
    assert torch.equal(part.gradients, call.gradients[:, 2:])


def test_every_edge_to_a_leaf_is_found_once():
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    leaves = [leaf for _, leaf in edges_to_leaves((a * b + a * 2).sum())]
    assert sum(leaf is a for leaf in leaves) == 2
    assert sum(leaf is b for leaf in leaves) == 1
    assert list(edges_to_leaves(torch.ones(2))) == []


@pytest.mark.parametrize("feature", [0, 11])
def test_a_gradient_is_found_in_whatever_feature_it_is(feature):
    gradients = torch.zeros(1, 2, 32, 12)
    gradients[0, :, 5, feature] = 3.0
    call = LayerCall(Linear(has_bias=False), torch.ones(2, 32, 4), gradients)
    some = call.at_positions(1, torch.tensor([0.1, 0.9], dtype=torch.float64))
    assert some.gradients.square().sum() == gradients.square().sum()
