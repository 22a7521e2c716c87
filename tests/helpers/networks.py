"""Small networks with layers of every kind, data for them, and a short call to extract."""

import copy
import functools

import pytest
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher.extraction.extract import extract_curvature

CLASSES, SAMPLES, BATCH = 3, 7, 3
MC = {"draws": 3, "seed": 5, "tolerance": 0.0}  # options of an extraction
EXTRACTED = ("diagonal", "dense", "input_gram", "kfac", "ekfac")


class Net(nn.Module):
    """Modules by name and a forward pass as a function of them and the input."""

    def __init__(self, forward, **modules):
        super().__init__()
        self._forward = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self._forward(self, x)


def _lenet(bias):
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=bias),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 5, bias=bias),
        nn.Tanh(),
        nn.Linear(5, CLASSES, bias=bias),
    )


def _conv_head(conv, features):
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(features, CLASSES))


def _functional():
    def forward(net, x):
        x = F.max_pool2d(F.relu(net.first(x)), 2)
        return net.head(F.relu(net.hidden(F.relu(net.second(x)).flatten(1))))

    return Net(
        forward,
        first=nn.Conv2d(2, 3, 3),
        second=nn.Conv2d(3, 4, 2),
        hidden=nn.Linear(16, 5),
        head=nn.Linear(5, CLASSES),
    )


def _residual(norm=False):
    def forward(net, x):
        x = net.inner(x)
        out = net.second(torch.relu(net.norm(net.first(x)))) + x
        return net.head(torch.cat([out, x], dim=1).mean(dim=(2, 3)))

    return Net(
        forward,
        inner=nn.Conv2d(2, 3, 1),
        first=nn.Conv2d(3, 3, 3, padding=1, bias=not norm),
        norm=nn.BatchNorm2d(3) if norm else nn.Identity(),
        second=nn.Conv2d(3, 3, 3, padding=1, groups=3 if norm else 1),
        head=nn.Linear(6, CLASSES),
    )


def _inplace():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 4, 2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(16, 5),
        nn.LeakyReLU(0.1, inplace=True),
        nn.Linear(5, CLASSES),
    )


def _positions():
    return Net(
        lambda net, x: net.head(torch.tanh(net.mix(torch.tanh(net.embed(x)))).mean(1)),
        embed=nn.Linear(5, 4),
        mix=nn.Linear(4, 4, bias=False),
        head=nn.Linear(4, CLASSES),
    )


def _channels_last():
    return Net(
        lambda net, x: net.head(torch.tanh(net.embed(x.permute(0, 2, 3, 1))).mean((1, 2))),
        embed=nn.Linear(2, 8),
        head=nn.Linear(8, CLASSES),
    )


def _inplace_functional():
    def forward(net, x):
        out = F.relu_(net.first(x))
        out = net.second(out)
        out += x
        return net.head(out.flatten(1))

    return Net(
        forward,
        first=nn.Conv2d(2, 3, 3, padding=1),
        second=nn.Conv2d(3, 2, 3, padding=1),
        head=nn.Linear(128, CLASSES),
    )


def _called_twice():
    return Net(
        lambda net, x: net.head(torch.tanh(net.body(torch.tanh(net.body(x))))),
        body=nn.Linear(4, 4),
        head=nn.Linear(4, CLASSES),
    )


def _tied(own_biases):
    net = Net(
        lambda net, x: net.head(torch.tanh(net.second(torch.tanh(net.first(x))))),
        first=nn.Linear(4, 4, bias=own_biases),
        second=nn.Linear(4, 4, bias=own_biases),
        head=nn.Linear(4, CLASSES),
    )
    net.second.weight = net.first.weight
    return net


def _tied_bias():
    net = _tied(own_biases=True)
    net.second.weight = nn.Parameter(net.second.weight.detach().clone())
    net.second.bias = net.first.bias
    return net


def _frozen():
    net = _lenet(bias=True)
    net[0].requires_grad_(False)
    net[4].bias.requires_grad_(False)
    return net


def _tokens(x):
    return (x[..., 0].abs() * 3).long().clamp_max(5)


def _embedded(tied=False, **options):
    def forward(net, x):
        h = torch.tanh(net.mix(net.embed(_tokens(x)))).mean(1)
        return F.linear(h, net.embed.weight)[:, :CLASSES] if tied else net.head(h)

    modules = {} if tied else {"head": nn.Linear(4, CLASSES)}
    return Net(forward, embed=nn.Embedding(6, 4, **options), mix=nn.Linear(4, 4), **modules)


def _positions_embedded():
    return Net(
        lambda net, x: net.head(torch.tanh(net.embed(x) + net.place(torch.arange(4))).mean(1)),
        embed=nn.Linear(5, 4),
        place=nn.Embedding(4, 4),
        head=nn.Linear(4, CLASSES),
    )


def _transposed():
    return _conv_head(
        nn.ConvTranspose2d(2, 3, (3, 2), stride=(2, 1), padding=1, output_padding=(1, 0)), 336
    )


def _norms():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.GroupNorm(2, 4),
        nn.LayerNorm([6, 6]),
        nn.PReLU(4),
        nn.Conv2d(4, 4, 3, groups=2, padding=1),
        nn.RMSNorm(6),
        nn.Flatten(),
        nn.Linear(144, CLASSES),
    )


def _attention(batch_first):
    def forward(net, x):
        x = torch.tanh(net.embed(x))
        x = x if batch_first else x.transpose(0, 1)
        return net.head(net.attend(x, x, x)[0].mean(1 if batch_first else 0))

    return Net(
        forward,
        embed=nn.Linear(5, 4),
        attend=nn.MultiheadAttention(4, 2, batch_first=batch_first),
        head=nn.Linear(4, CLASSES),
    )


class _Tokens(nn.Module):
    """A vision transformer in the small: class token, positions, encoder."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.places = nn.Parameter(torch.randn(1, 5, 4))
        self.embed = nn.Linear(5, 4)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], dim=1)
        return self.head(self.encoder(x + self.places)[:, 0])


def _recurrent():
    return Net(
        lambda net, x: net.head(net.cell(x)[0][:, -1]),
        cell=nn.LSTM(5, 3, batch_first=True),
        head=nn.Linear(3, CLASSES),
    )


def _bare():
    def forward(net, x):
        x = torch.tanh(torch.einsum("nc,cr->nr", x, net.first))
        return x @ net.second.T + net.third

    net = Net(forward)
    net.first = nn.Parameter(torch.randn(4, 5))
    net.second = nn.Parameter(torch.randn(CLASSES, 5))
    net.third = nn.Parameter(torch.randn(CLASSES))
    return net


def _weights_alone():
    return Net(
        lambda net, x: net.head(F.linear(torch.tanh(net.body(x)), net.body.weight.T)),
        body=nn.Linear(4, 4),
        head=nn.Linear(4, CLASSES),
    )


class _Standardised(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight / self.weight.norm(), self.bias)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * F.linear(x, self.weight, self.bias)


IMAGE, SEQUENCE, VECTOR = (2, 8, 8), (4, 5), (4,)


NETS = {
    "lenet": (lambda: _lenet(bias=True), IMAGE),
    "lenet without bias": (lambda: _lenet(bias=False), IMAGE),
    "functional": (_functional, IMAGE),
    "residual": (_residual, IMAGE),
    "inplace": (_inplace, IMAGE),
    "positions": (_positions, SEQUENCE),
    "channels last": (_channels_last, IMAGE),
    "same": (lambda: _conv_head(nn.Conv2d(2, 2, (3, 5), padding="same"), 128), IMAGE),
    "same even": (
        lambda: _conv_head(nn.Conv2d(2, 2, (2, 4), padding="same", dilation=(1, 3)), 128),
        IMAGE,
    ),
    "dilated": (
        lambda: _conv_head(nn.Conv2d(2, 3, 3, dilation=2, padding=(1, 2), bias=False), 144),
        IMAGE,
    ),
    "asymmetric": (
        lambda: _conv_head(nn.Conv2d(2, 3, (3, 2), stride=(2, 3), padding=(0, 1)), 27),
        IMAGE,
    ),
    "valid": (lambda: _conv_head(nn.Conv2d(2, 2, 5, padding="valid"), 32), IMAGE),
    "inplace functional": (_inplace_functional, IMAGE),
    "circular": (
        lambda: _conv_head(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), 128),
        IMAGE,
    ),
    "conv1d": (lambda: _conv_head(nn.Conv1d(4, 3, 2, stride=2, padding=1), 9), SEQUENCE),
    "conv3d": (lambda: _conv_head(nn.Conv3d(1, 2, 2, stride=2), 16), (1, 4, 4, 4)),
    "transposed": (_transposed, IMAGE),
    "embedding": (_embedded, SEQUENCE),
    "embedding with padding": (lambda: _embedded(padding_idx=1), SEQUENCE),
    # The batch is not the first dimension of the layer's input
    "positions first": (
        lambda: Net(
            lambda net, x: torch.tanh(net.embed(x.transpose(0, 1))).mean(0),
            embed=nn.Linear(5, CLASSES),
        ),
        SEQUENCE,
    ),
    "positions flattened": (
        lambda: Net(
            lambda net, x: torch.tanh(net.embed(x.flatten(0, 1))).unflatten(0, x.shape[:2]).mean(1),
            embed=nn.Linear(5, CLASSES),
        ),
        SEQUENCE,
    ),
    "frames flattened": (
        lambda: Net(
            lambda net, x: net.head(
                torch.tanh(net.conv(x.flatten(0, 1).unsqueeze(1)))
                .unflatten(0, x.shape[:2])
                .mean((1, 3, 4))
            ),
            conv=nn.Conv2d(1, 3, 3),
            head=nn.Linear(3, CLASSES),
        ),
        IMAGE,
    ),
    "called twice": (_called_twice, VECTOR),
    "tied": (lambda: _tied(own_biases=False), VECTOR),
    "scaled": (lambda: nn.Sequential(Scaled(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)), VECTOR),
    "frozen": (_frozen, IMAGE),
    # Layers without Kronecker factors
    "tied with biases": (lambda: _tied(own_biases=True), VECTOR),
    "tied biases": (_tied_bias, VECTOR),
    "tied embedding": (lambda: _embedded(tied=True), SEQUENCE),
    "positions embedded": (_positions_embedded, SEQUENCE),
    "normed and grouped": (lambda: _residual(norm=True), IMAGE),
    "norms": (_norms, IMAGE),
    "attention": (lambda: _attention(batch_first=True), SEQUENCE),
    "attention positions first": (lambda: _attention(batch_first=False), SEQUENCE),
    "tokens": (_Tokens, SEQUENCE),
    "recurrent": (_recurrent, SEQUENCE),
    "bare": (_bare, VECTOR),
    "weights alone": (_weights_alone, VECTOR),
    "standardised": (lambda: nn.Sequential(_Standardised(4, CLASSES), nn.Tanh()), VECTOR),
}
# Layers that get a diagonal although their module's type has Kronecker factors: their weights are
# used otherwise, or apart.
USED_OTHERWISE = {
    "tied with biases": {"first", "second.bias"},
    "tied biases": {"first"},
    "tied embedding": {"embed"},
    "positions embedded": {"place"},
    "weights alone": {"body"},
    "standardised": {"0"},
}
# Linear maps of modules that call no module of theirs: only the other oracle, in
# test_against_oracle.py, knows the sides of their gradients.
OPENED = ("in_proj_weight", "out_proj", "weight_ih_l0", "weight_hh_l0")

every_net = pytest.mark.parametrize("net", NETS)
every_extracted_kind = pytest.mark.parametrize("kind", EXTRACTED)
ignore_padding = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@functools.cache
def _cached_net(net):
    build, _ = NETS[net]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = build().double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model


def build_net(net):
    """A network by its name, in float64, with the same weights every time."""
    return copy.deepcopy(_cached_net(net))


def make_data(shape, samples=SAMPLES, seed=0):
    """Random inputs and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, *shape, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, CLASSES, (samples,), generator=generator))


def extract(model, data, kind="kfac", **options):
    """Curvature of a data set in small batches, or of any loader, at all positions of a sample."""
    if isinstance(data, TensorDataset):
        data = DataLoader(data, batch_size=BATCH)
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)

    def in_its_type(batch):
        return apply_to_collection(
            batch, torch.Tensor, lambda t: t.to(dtype if t.is_floating_point() else None)
        )

    usual = {"progress": False, "positions": None, "prepare": in_its_type}
    return extract_curvature(model, data, kind, **usual | options)


class Recording(TensorDataset):
    """Remembers which samples were read."""

    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.read = []

    def __getitem__(self, index):
        self.read.append(int(index))
        return super().__getitem__(index)


def make_recorded(shape=IMAGE, samples=21):
    """The same data every time, which remembers anew what is read."""
    return Recording(*make_data(shape, samples).tensors)
