"""Every parameter belongs to exactly one layer, and layers and matrices convert both ways."""

import pytest
import torch
from torch import nn

from lightning_fedfisher.errors import UnsupportedModelError
from lightning_fedfisher.layers import Layer, aliases, find_layers, frozen_parameters


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

    # So it is for the linear layer of GPT-2, which goes by its name.
    conv = type("Conv1D", (nn.Linear,), {"__module__": "transformers.pytorch_utils"})
    weight, bias = find_layers(nn.Sequential(conv(3, 3)))
    assert (weight.shape, bias.shape) == ((3, 3), (3, 1))
    (layer,) = find_layers(nn.Sequential(type("Conv1D", (nn.Linear,), {})(3, 3)))
    assert layer.shape == (3, 4)

    # A weight and its bias find each other by name and shape, in any module.
    gru = {layer.name: layer.parameter_names for layer in find_layers(nn.GRU(3, 2))}
    assert gru == {
        "weight_ih_l0": ("weight_ih_l0", "bias_ih_l0"),
        "weight_hh_l0": ("weight_hh_l0", "bias_hh_l0"),
    }
    attention = {layer.name: layer.shape for layer in find_layers(nn.MultiheadAttention(4, 2))}
    assert attention == {"in_proj_weight": (12, 5), "out_proj": (4, 5)}

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


def _tied():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict(
        {
            "parameter": nn.Linear(3, 3),
            "same_parameter": nn.Linear(3, 3),
            "module": shared,
            "same_module": shared,
            "good": nn.Linear(3, 3),
        }
    )
    model["same_parameter"].weight = model["parameter"].weight
    return model


def test_a_shared_parameter_is_one_under_its_first_name():
    model = _tied()
    assert {layer.name: layer.parameter_names for layer in find_layers(model)} == {
        "parameter": ("parameter.weight", "parameter.bias"),
        "same_parameter.bias": ("same_parameter.bias",),
        "module": ("module.weight", "module.bias"),
        "good": ("good.weight", "good.bias"),
    }
    assert aliases(model) == {
        "same_parameter.weight": "parameter.weight",
        "same_module.weight": "module.weight",
        "same_module.bias": "module.bias",
    }
    assert aliases(_deep()) == {}


def test_frozen_parameters_belong_to_no_layer():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[0].bias.requires_grad_(False)
    model[1].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    assert {layer.name: layer.parameter_names for layer in find_layers(model)} == {
        "0": ("0.weight",),
        "2.bias": ("2.bias",),
        "3": ("3.weight", "3.bias"),
    }
    frozen = frozen_parameters(model)
    assert list(frozen) == ["0.bias", "1.weight", "1.bias", "2.weight"]
    assert frozen["1.weight"] is model[1].weight
    assert frozen_parameters(_deep()) == {}
    # A frozen parameter may be shared: it has one name too.
    shared = _tied()
    shared["parameter"].weight.requires_grad_(False)
    assert list(frozen_parameters(shared)) == ["parameter.weight"]


def test_what_cannot_be_used_is_named_in_one_error():
    model = nn.ModuleDict(
        {
            "memory": nn.Linear(3, 3, bias=False),
            "same_memory": nn.Linear(3, 3, bias=False),
            "empty": nn.ParameterList([nn.Parameter(torch.empty(0, 3))]),
            "complex": nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.complex64))]),
            "loss": nn.CrossEntropyLoss(),
            "good": nn.Linear(3, 3),
        }
    )
    model["same_memory"].weight.data = model["memory"].weight.data
    with pytest.raises(UnsupportedModelError) as caught:
        find_layers(model)
    expected = (
        ("memory.weight", "same_memory.weight", "share memory"),
        ("empty.0", "is empty"),
        ("complex.0", "is complex", "view_as_real"),
    )
    assert len(caught.value.offenders) == len(expected)
    for words in expected:
        assert any(
            all(word in offender for word in words) for offender in caught.value.offenders
        ), words
    assert "good" not in str(caught.value)
    for offender in caught.value.offenders:
        assert offender in str(caught.value)


def test_two_empty_parameters_share_no_memory():
    model = nn.ParameterList([nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0))])
    with pytest.raises(UnsupportedModelError) as caught:
        find_layers(model)
    assert len(caught.value.offenders) == 2
    assert "share" not in str(caught.value)


def _transposed_decoder():
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 4, bias=False))
    model[1].weight.data = model[0].weight.data.T
    return model


def _part_of_another():
    model = nn.ParameterDict({"whole": torch.randn(4, 4)})
    model["rows"] = nn.Parameter(model["whole"].data[1:3])
    return model


@pytest.mark.parametrize("build", [_transposed_decoder, _part_of_another])
def test_different_parameters_that_overlap_in_memory_are_refused(build):
    with pytest.raises(UnsupportedModelError, match="share memory"):
        find_layers(build())


def test_neighbours_in_one_buffer_do_not_overlap():
    flat = torch.randn(21)
    model = nn.ParameterList([nn.Parameter(flat[:9].view(3, 3)), nn.Parameter(flat[9:])])
    assert len(find_layers(model)) == 2


def test_a_lazy_parameter_is_named():
    with pytest.raises(UnsupportedModelError, match=r"0\.weight"):
        find_layers(nn.Sequential(nn.LazyLinear(3)))


def test_a_model_without_parameters_is_refused():
    with pytest.raises(UnsupportedModelError, match="no parameters"):
        find_layers(nn.Sequential(nn.ReLU(), nn.Flatten()))
    with pytest.raises(UnsupportedModelError, match="no parameters that are trained"):
        find_layers(nn.Linear(3, 2).requires_grad_(False))
