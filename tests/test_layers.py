"""Every parameter belongs to exactly one layer, and layers and matrices convert both ways."""

import pytest
import torch
from torch import nn

from lightning_fedfisher.layers import Layer, UnsupportedModelError, find_layers, require_support


class _Bare(nn.Module):
    """Bare parameters of every shape beside a layer, as transformers and scaled nets hold."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(2, 3, 4))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.weight = nn.Parameter(torch.randn(3))
        self.head = nn.Linear(4, 2)


class _Wrapper(nn.Module):
    """The shape of a LightningModule: a network and a loss as attributes."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.loss = nn.CrossEntropyLoss()


def _deep():
    block = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
    return nn.Sequential(block, nn.Sequential(nn.Flatten(), nn.Linear(8, 3, bias=False)))


NETS = {
    "linear": lambda: nn.Linear(3, 2),
    "linear without bias": lambda: nn.Linear(3, 2, bias=False),
    "conv": lambda: nn.Sequential(nn.Conv2d(2, 4, (3, 2))),
    "conv without bias": lambda: nn.Sequential(nn.Conv2d(2, 4, (3, 2), bias=False)),
    "batchnorm": lambda: nn.Sequential(nn.BatchNorm2d(5)),
    "batchnorm without affine": lambda: nn.Sequential(
        nn.BatchNorm2d(5, affine=False), nn.Linear(5, 1)
    ),
    "transposed conv": lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2)),
    "bare": _Bare,
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "embedding": lambda: nn.Sequential(nn.Embedding(7, 3), nn.LSTM(3, 2)),
    "deep": _deep,
    "wrapped": lambda: _Wrapper(_deep()),
    "wrapped twice": lambda: _Wrapper(_Wrapper(nn.Linear(3, 2))),
}


def _parameters(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("net", NETS)
def test_every_parameter_exactly_once_and_in_order(net):
    model = NETS[net]()
    layers = find_layers(model)
    covered = [name for layer in layers for name in layer.parameter_names]
    assert sorted(covered) == sorted(_parameters(model))
    assert len({layer.name for layer in layers}) == len(layers)
    first_of_each = [layer.parameter_names[0] for layer in layers]
    order = list(_parameters(model))
    assert first_of_each == sorted(first_of_each, key=order.index)


@pytest.mark.parametrize("net", NETS)
def test_join_and_split_are_inverse(net):
    model = NETS[net]()
    parameters = _parameters(model)
    for layer in find_layers(model):
        matrix = layer.join(parameters)
        assert matrix.shape == layer.shape
        assert matrix.numel() == sum(parameters[name].numel() for name in layer.parameter_names)
        back = layer.split(matrix)
        assert tuple(back) == layer.parameter_names
        for name, tensor in back.items():
            assert torch.equal(tensor, parameters[name])
            assert tensor.shape == parameters[name].shape
            assert tensor.is_contiguous()
        other = torch.randn(layer.shape)
        assert torch.equal(layer.join(layer.split(other)), other)


def test_split_owns_its_memory():
    (layer,) = find_layers(nn.Linear(3, 2))
    matrix = torch.randn(layer.shape)
    before = matrix.clone()
    for tensor in layer.split(matrix).values():
        tensor.zero_()
    assert torch.equal(matrix, before)


def test_a_layer_acts_on_an_input_with_a_constant_one():
    linear, x = nn.Linear(3, 2), torch.randn(3)
    matrix = find_layers(linear)[0].join(_parameters(linear))
    torch.testing.assert_close(matrix @ torch.cat([x, torch.ones(1)]), linear(x))

    conv, image = nn.Conv2d(2, 4, (3, 2)), torch.randn(2, 3, 2)
    matrix = find_layers(conv)[0].join(_parameters(conv))
    patch = torch.cat([image.flatten(), torch.ones(1)])
    torch.testing.assert_close(matrix @ patch, conv(image).flatten())


def test_known_layers():
    assert find_layers(nn.Linear(3, 2)) == (Layer("weight", (("weight", (2, 3)), ("bias", (2,)))),)
    conv, norm, linear = find_layers(_Wrapper(_deep()))
    assert conv == Layer(
        "model.0.0", (("model.0.0.weight", (2, 1, 3, 3)), ("model.0.0.bias", (2,)))
    )
    assert (conv.shape, conv.module_name) == ((2, 10), "model.0.0")
    assert (norm.name, norm.shape) == ("model.0.1", (2, 2))
    assert linear == Layer("model.1.1", (("model.1.1.weight", (3, 8)),))

    # The rows of a transposed convolution are its inputs, and its bias belongs to its outputs.
    weight, bias = find_layers(nn.Sequential(nn.ConvTranspose2d(2, 3, 2)))
    assert (weight.name, weight.shape) == ("0.weight", (2, 12))
    assert (bias.name, bias.shape) == ("0.bias", (3, 1))

    bare = {layer.name: layer for layer in find_layers(_Bare())}
    assert {name: layer.shape for name, layer in bare.items()} == {
        "token": (2, 12),
        "scale": (1, 1),
        "weight": (3, 1),
        "head": (2, 5),
    }
    assert bare["scale"].module_name == ""


def test_the_model_is_left_alone():
    model = _deep()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    find_layers(model)
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.grad is None


def test_tied_frozen_and_empty_parameters_are_named_in_one_error():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict(
        {
            "parameter": nn.Linear(3, 3),
            "same_parameter": nn.Linear(3, 3),
            "module": shared,
            "same_module": shared,
            "memory": nn.Linear(3, 3, bias=False),
            "same_memory": nn.Linear(3, 3, bias=False),
            "frozen": nn.Linear(3, 3),
            "empty": nn.ParameterList([nn.Parameter(torch.empty(0, 3))]),
            "good": nn.Linear(3, 3),
        }
    )
    model["same_parameter"].weight = model["parameter"].weight
    model["same_memory"].weight.data = model["memory"].weight.data
    model["frozen"].bias.requires_grad_(False)
    with pytest.raises(UnsupportedModelError) as caught:
        find_layers(model)
    expected = (
        ("parameter.weight", "same_parameter.weight", "tied"),
        ("module.weight", "same_module.weight", "tied"),
        ("module.bias", "same_module.bias", "tied"),
        ("memory.weight", "same_memory.weight", "tied"),
        ("frozen.bias", "frozen:"),
        ("empty.0", "empty:"),
    )
    assert len(caught.value.offenders) == len(expected)
    for words in expected:
        assert any(
            all(word in offender for word in words) for offender in caught.value.offenders
        ), words
    assert "good" not in str(caught.value)
    for offender in caught.value.offenders:
        assert offender in str(caught.value)


def test_two_empty_parameters_are_not_tied():
    model = nn.ParameterList([nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0))])
    with pytest.raises(UnsupportedModelError) as caught:
        find_layers(model)
    assert len(caught.value.offenders) == 2
    assert "tied" not in str(caught.value)


def test_a_decoder_that_shares_its_encoders_memory_transposed_is_tied():
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 4, bias=False))
    model[1].weight.data = model[0].weight.data.T
    with pytest.raises(UnsupportedModelError, match="tied"):
        find_layers(model)


def test_a_lazy_parameter_is_named():
    with pytest.raises(UnsupportedModelError, match=r"0\.weight"):
        find_layers(nn.Sequential(nn.LazyLinear(3)))


def test_a_model_without_parameters_is_refused():
    with pytest.raises(UnsupportedModelError, match="no parameters"):
        find_layers(nn.Sequential(nn.ReLU(), nn.Flatten()))


def test_require_support_names_every_refused_layer():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 2), nn.PReLU())
    layers = find_layers(model)
    require_support(model, layers, lambda module: None)
    with pytest.raises(UnsupportedModelError) as caught:
        require_support(
            model, layers, lambda module: None if isinstance(module, nn.Linear) else "why not"
        )
    assert caught.value.offenders == (
        "1.weight, 1.bias of LayerNorm: why not",
        "3.weight of PReLU: why not",
    )
