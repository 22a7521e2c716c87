"""Features of several layers before a head in closed form."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models

from lightning_fedfisher import LayerFeatures, MergeError, fit_closed_form_head, merge_updates
from lightning_fedfisher.layer_features import _feature_dim, find_blocks


class _Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


class _Noise(nn.Module):
    """Draws random numbers."""

    def forward(self, x):
        return x + torch.randn_like(x)


class _Tokens(nn.Module):
    """A block of transformers and of networks that keep features last."""

    def __init__(self, width, in_a_tuple=False):
        super().__init__()
        self.linear, self.in_a_tuple = nn.Linear(width, width), in_a_tuple

    def forward(self, x):
        out = x + self.linear(x)
        return (out, None) if self.in_a_tuple else out


def _images(samples=6):
    return torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _body(*widths):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = [_Block(a, b) for a, b in zip((3, *widths), widths, strict=False)]
        return nn.Sequential(*blocks, nn.Flatten(), nn.Identity()).eval()


def test_they_are_the_scaled_means_of_each_layer():
    body, x = _body(4, 6), _images()
    first = body[0](x)
    means = [first.mean((2, 3)), body[1](first).mean((2, 3))]
    expected = [mean / mean.square().mean(1, keepdim=True).sqrt() for mean in means]
    features = LayerFeatures(body, x[:1])
    assert (features.layers, features.out_features) == (("0", "1"), 10)
    torch.testing.assert_close(features(x), torch.cat(expected, 1), rtol=1e-4, atol=1e-5)
    assert torch.equal(LayerFeatures(body, x[:1], layers=["1"])(x), features(x)[:, 4:])


class _Chain(nn.ModuleList):
    """Modules that run one after the other, as often as they are told to."""

    def __init__(self, modules, order):
        super().__init__(modules)
        self.order = order

    def forward(self, x):
        for index in self.order:
            x = self[index](x)
            x = x[0] if isinstance(x, tuple) else x
        return x


@pytest.mark.parametrize("in_a_tuple", [False, True])
@pytest.mark.parametrize("positions", [(5,), (4, 4), ()])
def test_features_may_come_last(positions, in_a_tuple):
    body = _Chain([_Tokens(6, in_a_tuple), _Tokens(6)], [0, 1])
    x = torch.randn(3, *positions, 6)
    features = LayerFeatures(body, x, layers=["0"])
    output = x + body[0].linear(x)
    expected = output.flatten(1, -2).mean(1) if positions else output
    torch.testing.assert_close(features(x), functional.rms_norm(expected, (6,)))


def test_the_dimension_of_the_features_can_be_told():
    body, x = nn.Sequential(nn.AvgPool2d(2), nn.Identity()), _images()
    assert LayerFeatures(body, x, layers=["0"]).out_features == 3
    assert LayerFeatures(body, x, layers=["0"], channel_dim=-1).out_features == 4


def test_blocks_are_those_with_most_weights():
    many, few = [_Tokens(2) for _ in range(5)], [_Block(3, 20), _Block(20, 20)]
    assert find_blocks(nn.Sequential(*many, *few)) == ["5", "6"]
    assert find_blocks(nn.Sequential(*many, few[0])) == ["0", "1", "2", "3", "4"]


def test_blocks_that_do_not_run_are_left_out():
    class _Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([_Block(3, 4), _Block(4, 5)])
            self.aside = _Block(3, 40)

        def forward(self, x):
            return self.blocks[1](self.blocks[0](x))

    assert LayerFeatures(_Aside(), _images()).layers == ("blocks.0", "blocks.1")


def test_blocks_are_found():
    assert find_blocks(_body(4, 6)) == ["0", "1"]
    assert find_blocks(models.resnet18())[-1] == "layer4.1"
    assert len(find_blocks(models.vit_b_16())) == 12
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 3)
    assert find_blocks(encoder) == ["layers.0", "layers.1", "layers.2"]
    assert find_blocks(models.vgg11()) == []
    nested = nn.Sequential(_Block(3, 4), nn.Sequential(_Block(4, 5)))
    assert find_blocks(nested) == ["0", "1.0"]


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (100, "012345"),
        (20, "012345"),
        (19, "135"),  # every second, the last among them
        (8, "25"),
        (7, "01"),  # half of it and less: the first two
        (3, "5"),  # more than that, if nothing else is left
    ],
)
def test_layers_are_thinned_evenly(most, expected):
    body = _body(2, 2, 4, 4, 4, 4)
    features = LayerFeatures(body, _images(), max_features=most)
    assert "".join(features.layers) == expected


def test_everything_is_left_as_it_was():
    body = nn.Sequential(*_body(4, 6), _Noise()).train()
    before, state = copy.deepcopy(body.state_dict()), torch.random.get_rng_state()
    features = LayerFeatures(body, _images())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in body.state_dict().items())
    assert body.training
    assert body[0].training
    features(_images())
    assert not any(module._forward_hooks for module in features.modules())


def test_a_copy_reads_its_own_network():
    features = LayerFeatures(_body(4, 6), _images())
    copied = copy.deepcopy(features)
    with torch.no_grad():
        copied.network[1].norm.bias.copy_(torch.arange(6.0))
    assert not torch.equal(copied(_images()), features(_images()))
    assert torch.equal(features(_images()), LayerFeatures(_body(4, 6), _images())(_images()))


def test_gradients_are_those_of_the_means():
    body, x = _body(4, 6).double(), _images().double()
    features, weights = LayerFeatures(body, x), torch.arange(10.0).double()
    (features(x) @ weights).sum().backward()
    found = [parameter.grad.clone() for parameter in body.parameters()]
    body.zero_grad()
    first = body[0](x)
    parts = [first.mean((2, 3)), body[1](first).mean((2, 3))]
    scaled = [part / part.square().mean(1, keepdim=True).sqrt() for part in parts]
    (torch.cat(scaled, 1) @ weights).sum().backward()
    for parameter, gradient in zip(body.parameters(), found, strict=True):
        assert float(gradient.norm()) > 1e-3
        torch.testing.assert_close(gradient, parameter.grad)


def test_a_layer_is_read_before_others_write_over_it():
    norm = nn.BatchNorm2d(3).eval()
    body, x = nn.Sequential(norm, nn.ReLU(inplace=True)), _images()
    found = LayerFeatures(body, x, layers=["0"])(x)
    mean = norm(x).mean((2, 3))
    assert (mean < 0).any()
    torch.testing.assert_close(found, functional.rms_norm(mean, (3,)))


@pytest.mark.parametrize(
    ("layer", "shape", "dim"),
    [
        (nn.Conv2d(4, 8, 1), (2, 8, 4, 8), 1),
        (nn.Conv1d(4, 8, 1), (2, 8, 8), 1),
        (nn.Linear(4, 8), (2, 8, 8, 8), 3),
        (nn.Linear(4, 8), (2, 8, 8), 2),
        (nn.Sequential(nn.Linear(8, 8), nn.Conv2d(8, 8, 1)), (2, 8, 8), 2),  # of tokens
        (nn.BatchNorm2d(8), (2, 8, 8, 8), 1),
        (nn.ReLU(), (2, 8, 5), 2),
        (nn.ReLU(), (2, 8), 1),
    ],
)
def test_the_dimension_of_the_features_is_found(layer, shape, dim):
    assert _feature_dim(layer, len(shape)) == dim


def test_hooks_go_when_the_network_fails():
    features = LayerFeatures(_body(4, 6), _images())
    with pytest.raises(RuntimeError):
        features(torch.randn(2, 5, 8, 8))
    assert not any(module._forward_hooks for module in features.modules())


def test_layers_that_cannot_be_read_are_refused():
    body, x = _body(4, 6), _images()
    with pytest.raises(ValueError, match=r"no layers 7, head"):
        LayerFeatures(body, x, layers=["0", "7", "head"])
    with pytest.raises(ValueError, match="Linear has no blocks of one kind: name the layers"):
        LayerFeatures(nn.Linear(3, 2), torch.randn(2, 3))
    blocks = [_Block(3, 3), _Block(3, 3)]
    for order, said in (((0, 1, 0), "0 2"), ((0,), "1 0")):
        network = _Chain(blocks, order)
        with pytest.raises(ValueError, match=rf"once in a forward pass .*: {said} times"):
            LayerFeatures(network, x, layers=["0", "1"])


def test_samples_come_first_or_it_is_refused():
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2)  # of sequences first
    x = torch.randn(3, 7, 8)
    assert LayerFeatures(layers, x).out_features == 16  # as if there were three samples

    class _Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = _Tokens(8)

        def forward(self, x):
            return self.block(x.flatten(0, 1)).view_as(x)

    with pytest.raises(ValueError, match=r"samples first, 3 of them, .*: block \(21, 8\)"):
        LayerFeatures(_Folded(), x, layers=["block"])


def test_clients_that_read_other_layers_are_refused():
    x, y = _images(40), torch.arange(40) % 4
    heads = []
    for layers in (["0", "1"], ["1", "0"]):
        features = LayerFeatures(_body(4, 4), x[:1], layers=layers)
        model = nn.Sequential(features, nn.Linear(8, 4))
        heads.append(fit_closed_form_head(model, DataLoader(TensorDataset(x, y), 20)))
    with pytest.raises(MergeError, match=r"buffers/0\.layout"):
        merge_updates(heads, method="closed_form_head")
    assert bytes(features.layout.tolist()) == b"1 1\n0 1"


def test_what_is_no_tensor_of_features_is_refused():
    network = nn.Sequential(nn.Flatten(0), nn.ReLU())
    with pytest.raises(ValueError, match="1 gives no tensor of features"):
        LayerFeatures(network, _images(), layers=["1"])


def test_a_merged_head_on_them_is_that_of_all_samples():
    x = _images(120)
    y = (x[:, 0].mean((1, 2)) > 0).long() + 2 * (x[:, 1].mean((1, 2)) > 0).long()
    body = _body(8, 8)
    model = nn.Sequential(LayerFeatures(body, x[:1]), nn.Linear(16, 4))
    order, outputs = y.argsort(stable=True), []
    for parts in ([order], order.split([20, 90, 10])):
        heads = [
            fit_closed_form_head(model, DataLoader(TensorDataset(x[p], y[p]), 16)) for p in parts
        ]
        merged = copy.deepcopy(model)
        merged.load_state_dict(
            merge_updates(heads, method="closed_form_head").state_dict, strict=False
        )
        outputs.append(merged(x).detach())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-5)
    assert float((outputs[0].argmax(1) == y).float().mean()) > 0.5
