"""Every layer type, likelihood and real model against oracles that share no code with the package.

The oracle runs each sample alone and takes one plain backward pass for each of its logits. A layer
with a Kronecker form is checked against a walk over its positions, one cell at a time.
"""

import copy
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.convnext import CNBlockConfig

from lightning_fedfisher.errors import UnsupportedModelError
from lightning_fedfisher.extraction.accumulators import model_sums as second_moments
from lightning_fedfisher.extraction.extract import extract_curvature, extract_curvatures

CLASSES, SAMPLES, BATCH = 3, 5, 3
KINDS = ("diagonal", "dense", "kfac", "ekfac")
EXACT = 1e-10
pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel", "ignore:enable_nested_tensor is True"
)

# ---------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------


class _Net(nn.Module):
    """Modules and parameters by name, and a forward pass as a function of them and the input."""

    def __init__(self, forward, **parts):
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self._forward(self, x)


@dataclass(frozen=True)
class Case:
    """A network.

    Attributes:
        build: makes it.
        shape: of one input.
        tokens: size of the vocabulary, for inputs that are tokens.
        exact: layers without Kronecker factors, which get an exact diagonal.
        twin: makes the same function with the same parameters in the same order, whose linear maps
            are all modules, for the walk over positions.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (4,)
    tokens: int = 0
    exact: tuple[str, ...] = ()
    twin: Callable[[], nn.Module] | None = None


def _head(features):
    return nn.Linear(features, CLASSES)


def _mlp(*between, width=4):
    return nn.Sequential(nn.Linear(4, width), *between, nn.Tanh(), nn.Linear(width, CLASSES))


def _image(*layers):
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.LazyLinear(CLASSES))


def _sequence(forward, **parts):
    """Positions through `forward`, then their mean through a head."""
    return _Net(lambda net, x: net.head(torch.tanh(forward(net, x)).mean(1)), **parts)


def _positions_first(pool, **parts):
    def forward(net, x):
        x = torch.tanh(net.first(x.transpose(0, 1)))
        return net.head(pool(torch.tanh(net.second(x))))

    return _Net(
        forward, first=nn.Linear(3, 4), second=nn.Linear(4, 4, bias=False), head=_head(4), **parts
    )


def _class_token():
    def forward(net, x):
        x = torch.cat([net.token.expand(len(x), -1, -1), net.embed(x)], dim=1) + net.places
        x = x + net.scale * torch.tanh(net.mix(x))
        return net.head(x[:, 0] * x[:, 1:].mean(1))

    return _Net(
        forward,
        token=nn.Parameter(torch.zeros(1, 1, 4)),
        places=nn.Parameter(torch.zeros(1, 4, 4)),
        scale=nn.Parameter(torch.ones(4)),
        embed=nn.Linear(2, 4),
        mix=nn.Linear(4, 4),
        head=_head(4),
    )


class _Product(nn.Linear):
    """A linear map whose weight has inputs on its rows, and a bias of its own if it is shifted."""

    transposed = True

    def __init__(self, inputs, outputs, form, shifted=False):
        super().__init__(outputs, inputs, bias=False)
        self.form = form
        self.shift = nn.Parameter(torch.zeros(outputs)) if shifted else None

    def forward(self, x):
        if self.shift is None:
            return self.form(x, self.weight)
        return self.form(self.shift, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


def _products(form, shifted=False):
    return _sequence(
        lambda net, x: net.second(torch.tanh(net.first(x))),
        first=_Product(3, 5, form, shifted),
        second=_Product(5, 5, form, shifted),
        head=_head(5),
    )


class _Attention(nn.Module):
    """Multi-head attention written out, with `nn.MultiheadAttention`'s parameters."""

    def __init__(self, width, heads, bias):
        super().__init__()
        self.heads = heads
        self.inputs = nn.Linear(width, 3 * width, bias=bias)
        self.outputs = nn.Linear(width, width, bias=bias)

    def forward(self, x, hidden=None, keys=None, values=None):
        q, k, v = self.inputs(x).chunk(3, 2)
        if keys is not None:
            _, k, v = self.inputs(keys).chunk(3, 2)
        if values is not None:
            v = self.inputs(values).chunk(3, 2)[2]
        return self.attend(q, k, v, hidden)

    def attend(self, q, k, v, hidden):
        q, k, v = (part.unflatten(2, (self.heads, -1)) for part in (q, k, v))
        scores = torch.einsum("nthe,nshe->nhts", q, k) / math.sqrt(q.shape[-1])
        if hidden is not None:
            scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
        return self.outputs(torch.einsum("nhts,nshe->nthe", scores.softmax(3), v).flatten(2))


class _AttentionOfUnlike(_Attention):
    """The same for keys and values of sizes of their own."""

    def __init__(self, width, heads, bias):
        nn.Module.__init__(self)
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(n, width, bias=False) for n in (width, 3, 2))
        # PyTorch has the bias after the weights.
        self.of_q, self.of_k, self.of_v = self.q.weight, self.k.weight, self.v.weight
        self.bias = nn.Parameter(torch.zeros(3 * width)) if bias else None
        self.outputs = nn.Linear(width, width, bias=bias)

    def forward(self, x, hidden=None, keys=None, values=None):
        parts = self.q(x), self.k(keys), self.v(values)
        if self.bias is not None:
            parts = [p + b for p, b in zip(parts, self.bias.chunk(3), strict=True)]
        return self.attend(*parts, hidden)


def _hidden(x):
    """A key padding mask that depends on the sample; the first position is always seen."""
    hidden = x[..., 0] > 0.3
    return hidden & (torch.arange(x.shape[1]) > 0)


def _sides(x, cross):
    """Keys and values: the queries themselves, others, two others, or two of other sizes."""
    keys = x.flip(2)[:, 1:] if cross else x
    values = torch.sin(keys) if cross in ("values", "sizes") else keys
    return (keys[..., :3], values[..., :2]) if cross == "sizes" else (keys, values)


def _attention(batch_first=True, bias=True, masked=False, cross="", weights=True):
    def forward(net, x):
        keys, values = _sides(x, cross)
        sides = [x, keys, values]
        if not batch_first:
            turned = {id(side): side.transpose(0, 1) for side in sides}
            sides = [turned[id(side)] for side in sides]
        mask = _hidden(keys) if masked else None
        out, _ = net.mixer(*sides, key_padding_mask=mask, need_weights=weights)
        return net.head(torch.tanh(out if batch_first else out.transpose(0, 1)).mean(1))

    sizes = {"kdim": 3, "vdim": 2} if cross == "sizes" else {}
    mixer = nn.MultiheadAttention(4, 2, bias=bias, batch_first=batch_first, **sizes)
    return _Net(forward, mixer=mixer, head=_head(4))


def _attention_twin(bias=True, masked=False, cross=""):
    def forward(net, x):
        keys, values = _sides(x, cross)
        mask = _hidden(keys) if masked else None
        given = [side if side is not x else None for side in (keys, values)]
        if values is keys:
            given[1] = None
        return net.head(torch.tanh(net.mixer(x, mask, *given)).mean(1))

    kind = _AttentionOfUnlike if cross == "sizes" else _Attention
    return _Net(forward, mixer=kind(4, 2, bias), head=_head(4))


def _separate_attention():
    def forward(net, x):
        q, k, v = (side(x).unflatten(2, (2, 2)).transpose(1, 2) for side in (net.q, net.k, net.v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return net.out(out)

    linears = {name: nn.Linear(4, 4) for name in ("q", "k", "v", "out")}
    return _sequence(forward, **linears, head=_head(4))


class _Encoder(nn.Module):
    """A text classifier: tokens, learnt positions, a Transformer; token 0 is padding."""

    def __init__(self, batch_first, norm_first=False, pool="seen"):
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=0)
        self.places = nn.Parameter(torch.zeros(5, 4))
        layer = nn.TransformerEncoderLayer(
            4, 2, 6, dropout=0.1, batch_first=batch_first, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = _head(4)
        self.batch_first, self.pool = batch_first, pool

    def forward(self, tokens):
        x, hidden = self.embed(tokens) + self.places, tokens == 0
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x, src_key_padding_mask=hidden)
        x = x if self.batch_first else x.transpose(0, 1)
        if self.pool == "first":
            return self.head(x[:, 0])
        seen = (~hidden).unsqueeze(2)
        return self.head((x * seen).sum(1) / seen.sum(1))


class _EncoderTwin(nn.Module):
    """The same written out, parameters in the same order."""

    def __init__(self, norm_first=False, pool="seen"):
        super().__init__()
        self.places = nn.Parameter(torch.zeros(5, 4))
        self.embed = nn.Embedding(7, 4, padding_idx=0)
        self.layers = nn.ModuleList(
            nn.ModuleList((_Attention(4, 2, True), nn.Linear(4, 6), nn.Linear(6, 4), *_two_norms()))
            for _ in range(2)
        )
        self.head = _head(4)
        self.norm_first, self.pool = norm_first, pool

    def forward(self, tokens):
        x, hidden = self.embed(tokens) + self.places, tokens == 0
        for attention, first, second, norm, other in self.layers:
            if self.norm_first:
                x = x + attention(norm(x), hidden)
                x = x + second(F.relu(first(other(x))))
            else:
                x = norm(x + attention(x, hidden))
                x = other(x + second(F.relu(first(x))))
        if self.pool == "first":
            return self.head(x[:, 0])
        seen = (~hidden).unsqueeze(2)
        return self.head((x * seen).sum(1) / seen.sum(1))


def _two_norms():
    return nn.LayerNorm(4), nn.LayerNorm(4)


ENCODER_EXACT = (
    "places",
    *(f"encoder.layers.{i}.{part}" for i in range(2) for part in ("norm1", "norm2")),
)


def _pooled(net, sequence, states):
    """Logits that depend on all that a recurrent layer returns."""
    return net.head(torch.cat([sequence.mean(1), *(state.mean(0) for state in states)], dim=1))


def _recurrent_head(kind, bidirectional=False, proj_size=0, **_):
    lstm = kind is nn.LSTM
    return _head((proj_size or 2) * (2 + bidirectional) + 2 * lstm)


def _recurrent(kind, **options):
    def forward(net, x):
        first = options.get("batch_first", False)
        sequence, states = net.cells(x if first else x.transpose(0, 1))
        states = states if kind is nn.LSTM else (states,)
        return _pooled(net, sequence if first else sequence.transpose(0, 1), states)

    return _Net(forward, cells=kind(3, 2, **options), head=_recurrent_head(kind, **options))


def _cell_by_cell(kind, cell, **options):
    def forward(net, x):
        states, sequence = None, []
        for position in x.unbind(1):
            states = net.cells(position, states)
            sequence.append(states[0] if kind is nn.LSTM else states)
        states = states if kind is nn.LSTM else (states,)
        return _pooled(net, torch.stack(sequence, 1), [state[None] for state in states])

    return _Net(forward, cells=cell(3, 2, **options), head=_recurrent_head(kind))


class _Cells(nn.Module):
    """A recurrent layer by PyTorch's formulas, with its parameters in their order."""

    def __init__(
        self, kind, num_layers=1, bidirectional=False, proj_size=0, bias=True, nonlinearity="tanh"
    ):
        super().__init__()
        self.kind, self.layers, self.directions = kind, num_layers, 1 + bidirectional
        self.activation = getattr(torch, nonlinearity)
        gates = {nn.LSTM: 8, nn.GRU: 6, nn.RNN: 2}[kind]
        own, maps = nn.ParameterList(), nn.ModuleList()
        for layer in range(num_layers):
            for _ in range(self.directions):
                width = (proj_size or 2) * self.directions if layer else 3
                ih, hh = nn.Linear(width, gates, bias), nn.Linear(proj_size or 2, gates, bias)
                hr = nn.Linear(2, proj_size, bias=False) if proj_size else nn.Identity()
                weights = [ih.weight, hh.weight, ih.bias, hh.bias, *hr.parameters()]
                own.extend([weight for weight in weights if weight is not None])
                maps.append(nn.ModuleList([ih, hh, hr]))
        self.own, self.maps = own, maps  # the parameters are met in the order of the first

    def forward(self, x):
        last = []
        for layer in range(self.layers):
            outputs = []
            for direction in range(self.directions):
                ih, hh, hr = self.maps[layer * self.directions + direction]
                h, c = x.new_zeros(len(x), hh.in_features), x.new_zeros(len(x), 2)
                order = range(x.shape[1])
                found = {}
                for t in reversed(order) if direction else order:
                    a, b = ih(x[:, t]), hh(h)
                    if self.kind is nn.LSTM:
                        c = torch.sigmoid((a + b)[:, 2:4]) * c + torch.sigmoid(
                            (a + b)[:, 0:2]
                        ) * torch.tanh((a + b)[:, 4:6])
                        h = hr(torch.sigmoid((a + b)[:, 6:8]) * torch.tanh(c))
                    elif self.kind is nn.GRU:
                        reset, update = (
                            torch.sigmoid((a + b)[:, 0:2]),
                            torch.sigmoid((a + b)[:, 2:4]),
                        )
                        new = torch.tanh(a[:, 4:6] + reset * b[:, 4:6])
                        h = (1 - update) * new + update * h
                    else:
                        h = self.activation(a + b)
                    found[t] = h
                outputs.append(torch.stack([found[t] for t in order], 1))
                last.append((h, c))
            x = torch.cat(outputs, 2)
        hidden, cells = (torch.stack(part) for part in zip(*last, strict=True))
        return x, (hidden, cells) if self.kind is nn.LSTM else (hidden,)


class _RecurrentAlone(nn.Module):
    def __init__(self):
        super().__init__()
        ih, hh = nn.Linear(2, CLASSES), nn.Linear(CLASSES, CLASSES)
        self.own = nn.ParameterList([ih.weight, hh.weight, ih.bias, hh.bias])
        self.ih, self.hh = ih, hh

    def forward(self, x):
        h = x.new_zeros(len(x), CLASSES)
        for position in x.unbind(1):
            h = torch.tanh(self.ih(position) + self.hh(h))
        return h


def _recurrent_twin(kind, batch_first=False, **options):
    return _Net(
        lambda net, x: _pooled(net, *net.cells(x)),
        cells=_Cells(kind, **options),
        head=_recurrent_head(kind, **options),
    )


def _twice(different):
    def forward(net, x):
        first = torch.tanh(net.body(x))
        return torch.cat([net.body(first[:, :2] if different else first), first], dim=1)

    return _sequence(forward, body=nn.Linear(3, 3), head=_head(3))


def _two_convolutions_of_one():
    """One convolution over images of two sizes."""

    def forward(net, x):
        big, small = net.conv(x), net.conv(x[..., ::2, ::2])
        return net.head(torch.tanh(big.mean((2, 3))) + torch.tanh(small).amax((2, 3)))

    return _Net(forward, conv=nn.Conv2d(2, 3, 2), head=_head(3))


def _tied_linears(bias):
    net = nn.Sequential(
        nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES)
    )
    net[2].weight = net[0].weight
    if bias:
        net[2].bias = net[0].bias
    return net


def _tied_head():
    net = _Net(
        lambda net, x: net.head(torch.tanh(net.mix(net.embed(x))).mean(1)),
        embed=nn.Embedding(CLASSES, 4),
        mix=nn.Linear(4, 4),
        head=nn.Linear(4, CLASSES, bias=False),
    )
    net.head.weight = net.embed.weight
    return net


def _functional(direct):
    def forward(net, x):
        if direct:
            return net.head(torch.tanh(F.linear(x, net.body.weight, bias=net.body.bias)))
        return net.head(torch.tanh(net.body(x)))

    return _Net(forward, body=nn.Linear(4, 5), head=_head(5))


def _residual():
    def forward(net, x):
        x = F.relu(net.first(x), inplace=True)
        out = net.second(x)
        out += x
        return net.head(torch.cat([out, x], dim=1).flatten(1))

    return _Net(
        forward,
        first=nn.Conv2d(2, 2, 3, padding=1),
        second=nn.Conv2d(2, 2, 1, bias=False),
        head=_head(64),
    )


def _frozen():
    net = _mlp(nn.LayerNorm(4))
    net[0].weight.requires_grad_(False)
    net[1].bias.requires_grad_(False)
    return net


def _checkpointed(hidden=True):
    """Two layers behind another that are run again in the backward pass."""

    def forward(net, x):
        x = net.outside(x)
        return net.head(checkpoint(net.inner, x, use_reentrant=False) if hidden else net.inner(x))

    inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
    return _Net(forward, outside=nn.Linear(4, 4), inner=inner, head=_head(4))


def _embedding(**options):
    return _sequence(
        lambda net, x: net.mix(net.embed(x)),
        embed=nn.Embedding(6, 3, **options),
        mix=nn.Linear(3, 4),
        head=_head(4),
    )


def _folded(position_first):
    """Positions folded into the samples, outside or inside of them."""

    def forward(net, x):
        sides = (x.shape[1], len(x)) if position_first else (len(x), x.shape[1])
        x = (x.transpose(0, 1) if position_first else x).flatten(0, 1)
        return net.head(torch.tanh(net.body(x)).unflatten(0, sides).mean(int(not position_first)))

    return _Net(forward, body=nn.Linear(3, 4), head=_head(4))


def _frames():
    """Frames of a film folded into the samples of a convolution and a norm."""

    def forward(net, x):
        frames = torch.tanh(net.norm(net.conv(x.flatten(0, 1))))
        return net.head(frames.flatten(1).unflatten(0, x.shape[:2]).mean(1))

    return _Net(forward, conv=nn.Conv2d(1, 2, 2), norm=nn.GroupNorm(1, 2), head=_head(18))


SERIES, IMAGE, BODY = (2, 7), (2, 5, 4), (2, 3, 4, 3)


def _convolutions():
    c1, c2, c3 = nn.Conv1d, nn.Conv2d, nn.Conv3d
    t1, t2, t3 = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
    shapes = {1: SERIES, 2: IMAGE, 3: BODY}
    for make, arguments, options in (
        (c1, (2, 3, 3), {"stride": 2, "padding": 1}),
        (c1, (2, 3, 2), {"dilation": 3, "bias": False}),
        (c1, (2, 4, 3), {"groups": 2}),
        (c1, (2, 2, 4), {"padding": "same"}),
        (c1, (2, 2, 3), {"padding": 2, "padding_mode": "circular"}),
        (c2, (2, 3, (3, 2)), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
        (c2, (2, 3, 2), {"bias": False, "stride": 3}),
        (c2, (2, 3, 2), {"padding": "valid"}),
        (c2, (2, 2, 3), {"padding": "same"}),
        (c2, (2, 2, (2, 4)), {"padding": "same", "dilation": (3, 1)}),
        (c2, (2, 4, 2), {"groups": 2, "stride": 2, "padding": 1}),
        (c2, (2, 2, 3), {"groups": 2, "padding": 1, "dilation": 2, "bias": False}),
        (c2, (2, 4, (2, 2)), {"groups": 2, "padding": "same"}),
        (c2, (2, 2, 3), {"padding": (1, 2), "padding_mode": "circular"}),
        (c2, (2, 2, 3), {"padding": (2, 1), "padding_mode": "reflect", "stride": 2}),
        (c2, (2, 2, 2), {"padding": "same", "padding_mode": "reflect"}),
        (c2, (2, 2, 2), {"padding": "same", "padding_mode": "replicate", "groups": 2}),
        (c3, (2, 2, 2), {"stride": (1, 2, 1), "padding": (0, 1, 1)}),
        (c3, (2, 2, (2, 1, 2)), {"dilation": 2, "bias": False}),
        (c3, (2, 2, (2, 1, 3)), {"padding": "same"}),
        (c3, (2, 2, 2), {"groups": 2}),
        (t1, (2, 3, 3), {"stride": 2, "padding": 1}),
        (t1, (2, 2, 3), {"stride": 3, "output_padding": 2, "bias": False}),
        (t1, (2, 2, 2), {"groups": 2}),
        (t2, (2, 2, (3, 2)), {"stride": (2, 1), "padding": (2, 0), "output_padding": (1, 0)}),
        (t2, (2, 2, 3), {"dilation": (1, 2), "bias": False, "padding": (0, 3)}),
        (t2, (2, 2, 2), {"stride": 2, "output_padding": 2, "dilation": 3, "bias": False}),
        (t2, (2, 4, 2), {"groups": 2, "stride": 2}),
        (t3, (2, 2, 2), {"stride": (1, 2, 1), "padding": 1, "output_padding": (0, 1, 0)}),
        (t3, (2, 1, (1, 2, 1)), {"dilation": 2, "bias": False}),
        (t3, (2, 2, 1), {"groups": 2}),
    ):
        words = ", ".join(f"{name}={value}" for name, value in options.items())
        exact = []
        if issubclass(make, (t1, t2, t3)):
            bias = options.get("bias", True)
            exact += ["0.bias"] * bias
            exact += ["0.weight" if bias else "0"] * ("groups" in options)
        elif "groups" in options:
            exact = ["0"]

        def build(make=make, arguments=arguments, options=options):
            return _image(make(*arguments, **options))

        dimensions = len(shapes[int(make.__name__[-2])]) - 1
        yield f"{make.__name__}({words})", Case(build, shapes[dimensions], exact=tuple(exact))


NETS = {
    "linear": Case(_mlp),
    "linear without bias": Case(
        lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))
    ),
    "positions": Case(
        lambda: _sequence(
            lambda net, x: net.second(torch.tanh(net.first(x))),
            first=nn.Linear(3, 4),
            second=nn.Linear(4, 4, bias=False),
            head=_head(4),
        ),
        (6, 3),
    ),
    "two dimensions of positions": Case(
        lambda: _Net(
            lambda net, x: net.head(torch.tanh(net.body(x.permute(0, 2, 3, 1))).mean((1, 2))),
            body=nn.Linear(2, 4),
            head=_head(4),
        ),
        IMAGE,
    ),
    # Positions first: as many as samples in no batch, in a full batch, and in the first look.
    **{
        f"{t} positions first, {name}": Case(functools.partial(_positions_first, pool), (t, 3))
        for t in (2, BATCH, 4, 6)
        for name, pool in {
            "mean": lambda x: x.mean(0),
            "last": lambda x: x[-1],
            "middle": lambda x: x[len(x) // 2],
        }.items()
    },
    "positions folded": Case(lambda: _folded(False), (4, 3)),
    "positions folded first": Case(lambda: _folded(True), (4, 3)),
    "frames folded": Case(_frames, (2, 1, 4, 4), exact=("norm",)),
    **dict(_convolutions()),
    "embedding": Case(_embedding, (5,), 6),
    "embedding with padding": Case(lambda: _embedding(padding_idx=2), (5,), 6),
    "embedding with padding from the end": Case(lambda: _embedding(padding_idx=-1), (5,), 6),
    "embedding of one token": Case(
        lambda: _Net(
            lambda net, x: net.head(torch.tanh(net.embed(x))),
            embed=nn.Embedding(3, 4),
            head=_head(4),
        ),
        (),
        3,
    ),
    "embedding in two dimensions": Case(
        lambda: _Net(
            lambda net, x: net.head(torch.tanh(net.embed(x)).mean((1, 2))),
            embed=nn.Embedding(4, 3),
            head=_head(3),
        ),
        (2, 3),
        4,
    ),
    "embedding positions first": Case(
        lambda: _Net(
            lambda net, x: net.head(torch.tanh(net.embed(x.T)).mean(0)),
            embed=nn.Embedding(4, 3),
            head=_head(3),
        ),
        (4,),
        4,
    ),
    "embedding bag": Case(
        lambda: _Net(
            lambda net, x: net.head(torch.tanh(net.embed(x))),
            embed=nn.EmbeddingBag(4, 3),
            head=_head(3),
        ),
        (4,),
        4,
        exact=("embed",),
    ),
    "position table": Case(
        lambda: _sequence(
            lambda net, x: net.embed(x) + net.places(torch.arange(x.shape[1])),
            embed=nn.Embedding(4, 3),
            places=nn.Embedding(5, 3),
            head=_head(3),
        ),
        (5,),
        4,
        exact=("places",),
    ),
    "batch norm 1d": Case(lambda: _mlp(nn.BatchNorm1d(4)), exact=("1",)),
    "batch norm 1d over positions": Case(
        lambda: _image(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3)), SERIES, exact=("1",)
    ),
    "batch norm 2d": Case(
        lambda: _image(nn.Conv2d(2, 3, 2, bias=False), nn.BatchNorm2d(3)), IMAGE, exact=("1",)
    ),
    "layer norm": Case(lambda: _mlp(nn.LayerNorm(4)), exact=("1",)),
    "layer norm without bias": Case(lambda: _mlp(nn.LayerNorm(4, bias=False)), exact=("1",)),
    "layer norm over positions": Case(
        lambda: _sequence(
            lambda net, x: net.norm(net.body(x)),
            body=nn.Linear(3, 4),
            norm=nn.LayerNorm(4),
            head=_head(4),
        ),
        (5, 3),
        exact=("norm",),
    ),
    "layer norm positions first": Case(
        lambda: _Net(
            lambda net, x: net.head(torch.tanh(net.norm(x.transpose(0, 1))).mean(0)),
            norm=nn.LayerNorm(3),
            head=_head(3),
        ),
        (4, 3),
        exact=("norm",),
    ),
    "layer norm of two dimensions": Case(
        lambda: _image(nn.Conv1d(2, 3, 2), nn.LayerNorm((3, 6))),
        SERIES,
        exact=("1.weight", "1.bias"),
    ),
    "layer norm of two dimensions without bias": Case(
        lambda: _image(nn.Conv1d(2, 3, 2), nn.LayerNorm((3, 6), bias=False)), SERIES, exact=("1",)
    ),
    "group norm": Case(lambda: _image(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4)), IMAGE, exact=("1",)),
    "group norm of vectors": Case(lambda: _mlp(nn.GroupNorm(2, 4)), exact=("1",)),
    "instance norm": Case(
        lambda: _image(nn.Conv2d(2, 3, 2), nn.InstanceNorm2d(3, affine=True)), IMAGE, exact=("1",)
    ),
    "rms norm": Case(lambda: _mlp(nn.RMSNorm(4)), exact=("1",)),
    "rms norm over positions": Case(
        lambda: _sequence(
            lambda net, x: net.norm(net.body(x)),
            body=nn.Linear(3, 4),
            norm=nn.RMSNorm(4, eps=1e-3),
            head=_head(4),
        ),
        (5, 3),
        exact=("norm",),
    ),
    "prelu": Case(lambda: _mlp(nn.PReLU()), exact=("1",)),
    "prelu by channel": Case(lambda: _image(nn.Conv2d(2, 3, 2), nn.PReLU(3)), IMAGE, exact=("1",)),
    "class token": Case(_class_token, (3, 2), exact=("token", "places", "scale")),
    "scalar parameter": Case(
        lambda: _Net(
            lambda net, x: net.head(net.scale * x),
            scale=nn.Parameter(torch.tensor(1.0)),
            head=_head(4),
        ),
        exact=("scale",),
    ),
    **{
        f"attention, {name}": Case(
            functools.partial(_attention, **options),
            (4, 4),
            twin=functools.partial(
                _attention_twin,
                **{name: options[name] for name in ("bias", "masked") if name in options},
            ),
        )
        for name, options in {
            "samples first": {},
            "positions first": {"batch_first": False},
            "without bias": {"bias": False},
            "positions first without bias": {"batch_first": False, "bias": False},
            "masked": {"masked": True},
            "positions first and masked": {"batch_first": False, "masked": True},
            "without weights": {"weights": False},
        }.items()
    },
    **{
        f"cross-attention, {name}": Case(
            functools.partial(_attention, **{"cross": "keys"} | options),
            (3, 4),
            exact=("mixer.in_proj_bias",)
            if options.get("cross") == "sizes" and options.get("bias", True)
            else (),
            twin=functools.partial(
                _attention_twin,
                **{"cross": "keys"}
                | {n: options[n] for n in ("bias", "masked", "cross") if n in options},
            ),
        )
        for name, options in {
            "samples first": {},
            "positions first": {"batch_first": False},
            "without bias": {"bias": False},
            "masked": {"masked": True},
            "values of their own": {"cross": "values"},
            "values of their own, positions first without bias": {
                "cross": "values",
                "batch_first": False,
                "bias": False,
            },
            "other sizes": {"cross": "sizes"},
            "other sizes, positions first and masked": {
                "cross": "sizes",
                "batch_first": False,
                "masked": True,
            },
            "other sizes without bias": {"cross": "sizes", "bias": False},
        }.items()
    },
    **{
        f"product, {name}": Case(functools.partial(_products, form), (4, 3))
        for name, form in {
            "operator": lambda x, weight: x @ weight,
            "function": torch.matmul,
            "method": torch.Tensor.matmul,
            "of matrices": lambda x, weight: torch.mm(x.flatten(0, 1), weight).unflatten(
                0, x.shape[:2]
            ),
            "positions first": lambda x, weight: (x.transpose(0, 1) @ weight).transpose(0, 1),
        }.items()
    },
    **{
        f"shifted product, {name}": Case(
            functools.partial(_products, form, shifted=True),
            (4, 3),
            exact=("first.shift", "second.shift"),
        )
        for name, form in {"function": torch.addmm, "method": torch.Tensor.addmm}.items()
    },
    "shifted product by a pair of one layer": Case(
        lambda: _Net(
            lambda net, x: net.head(torch.tanh(torch.addmm(net.bias, x, net.weight))),
            weight=nn.Parameter(torch.zeros(4, 4)),
            bias=nn.Parameter(torch.zeros(4)),
            head=_head(4),
        ),
        exact=("weight",),
    ),
    "transposed convolution by a pair of one layer": Case(
        lambda: _Net(
            lambda net, x: net.head(
                torch.tanh(F.conv_transpose1d(x, net.weight, net.bias)).flatten(1)
            ),
            weight=nn.Parameter(torch.zeros(2, 2, 3)),
            bias=nn.Parameter(torch.zeros(2)),
            head=_head(12),
        ),
        (2, 4),
        exact=("weight",),
    ),
    "product of vectors": Case(
        lambda: nn.Sequential(_Product(4, 3, torch.mm), nn.Tanh(), nn.Linear(3, CLASSES))
    ),
    "attention by hand": Case(_separate_attention, (5, 4)),
    **{
        f"{kind.__name__}({', '.join(f'{n}={v}' for n, v in options.items())})": Case(
            functools.partial(_recurrent, kind, **options),
            (4, 3),
            twin=functools.partial(_recurrent_twin, kind, **options),
        )
        for kind, options in (
            (nn.LSTM, {}),
            (nn.LSTM, {"batch_first": True, "bias": False}),
            (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
            (nn.LSTM, {"proj_size": 1, "num_layers": 2, "bidirectional": True}),
            (nn.LSTM, {"proj_size": 1, "bias": False, "batch_first": True}),
            (nn.GRU, {"batch_first": True}),
            (nn.GRU, {"num_layers": 2, "bidirectional": True, "bias": False}),
            (nn.RNN, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
            (nn.RNN, {"nonlinearity": "relu"}),
        )
    },
    **{
        f"{cell.__name__}({', '.join(options)})": Case(
            functools.partial(_cell_by_cell, kind, cell, **options),
            (4, 3),
            twin=functools.partial(_recurrent_twin, kind, **options),
        )
        for kind, cell, options in (
            (nn.LSTM, nn.LSTMCell, {}),
            (nn.GRU, nn.GRUCell, {"bias": False}),
            (nn.RNN, nn.RNNCell, {}),
            (nn.RNN, nn.RNNCell, {"nonlinearity": "relu"}),
        )
    },
    "a recurrent net alone": Case(
        lambda: _Net(
            lambda net, x: net.cells(x)[0][:, -1], cells=nn.RNN(2, CLASSES, batch_first=True)
        ),
        (3, 2),
        twin=_RecurrentAlone,
    ),
    "a bare parameter alone": Case(
        lambda: _Net(lambda net, x: x.tanh() + net.shift, shift=nn.Parameter(torch.zeros(3))),
        (3,),
        exact=("shift",),
    ),
    "unknown layer between known ones": Case(
        lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU(), nn.Linear(3, 3), nn.Linear(3, CLASSES)),
        exact=("1",),
    ),
    "bilinear": Case(
        lambda: _Net(
            lambda net, x: net.head(net.pair(x[:, :2], x[:, 1:])),
            pair=nn.Bilinear(2, 3, 4),
            head=_head(4),
        ),
        exact=("pair",),
    ),
    "module called twice": Case(lambda: _twice(False), (4, 3)),
    "module called twice at different positions": Case(lambda: _twice(True), (4, 3)),
    "convolution of two images": Case(_two_convolutions_of_one, (2, 5, 5)),
    "tied linears": Case(lambda: _tied_linears(True)),
    "tied linears with biases of their own": Case(
        lambda: _tied_linears(False), exact=("0", "2.bias")
    ),
    "tied embedding and head": Case(_tied_head, (4,), CLASSES, exact=("embed",)),
    "functional": Case(lambda: _functional(True), twin=lambda: _functional(False)),
    "norm called twice": Case(
        lambda: _Net(
            lambda net, x: net.head(net.norm(torch.tanh(net.norm(x)))),
            norm=nn.LayerNorm(4),
            head=_head(4),
        ),
        exact=("norm",),
    ),
    "embedding called twice": Case(
        lambda: _sequence(
            lambda net, x: torch.cat([net.embed(x), 2 * net.embed(x[:, :2])], dim=1),
            embed=nn.Embedding(4, 3),
            head=_head(3),
        ),
        (4,),
        4,
    ),
    "residual, concatenated, in place": Case(_residual, (2, 4, 4)),
    "in-place activation": Case(lambda: _mlp(nn.LeakyReLU(0.1, inplace=True))),
    "frozen": Case(_frozen, exact=("0.bias", "1")),
    "weight norm": Case(
        lambda: _sequence(
            lambda net, x: net.body(x),
            body=parametrizations.weight_norm(nn.Linear(3, 4)),
            head=_head(4),
        ),
        (2, 3),
        exact=(
            "body.bias",
            "body.parametrizations.weight.original0",
            "body.parametrizations.weight.original1",
        ),
    ),
    "checkpoint": Case(_checkpointed, twin=lambda: _checkpointed(hidden=False)),
    **{
        f"text, {name}": Case(
            functools.partial(_Encoder, **options),
            (5,),
            7,
            exact=ENCODER_EXACT,
            twin=functools.partial(
                _EncoderTwin, **{k: v for k, v in options.items() if k != "batch_first"}
            ),
        )
        for name, options in {
            "samples first": {"batch_first": True},
            "positions first": {"batch_first": False},
            "samples first, norm first": {"batch_first": True, "norm_first": True},
            "first token": {"batch_first": True, "pool": "first"},
        }.items()
    },
}


def _inputs(case, samples=SAMPLES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if not case.tokens:
        return torch.randn(samples, *case.shape, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, case.tokens, (samples, *case.shape), generator=generator)
    if case.shape:
        tokens[:, 0] = tokens[:, 0].clamp_min(1)  # something to attend to
    return tokens


def _generic(model, x):
    """Initialises lazy parts and moves every parameter and statistic off its special value."""
    model = model.double()
    model(x)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.3 * noise
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model.eval()


@functools.cache
def _setting(net):
    """A network, its data, and what each sample's own passes give."""
    case = NETS[net]
    x = _inputs(case)
    y = torch.randint(0, CLASSES, (SAMPLES,), generator=torch.Generator().manual_seed(1))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = _generic(case.build(), x)
        walked = model
        if case.twin is not None:
            walked = case.twin().double().eval()
            _share(model, walked)
            torch.testing.assert_close(walked(x), model(x), rtol=0, atol=1e-12)
    return model, TensorDataset(x, y), _alone(model, x, walked)


def _share(model, twin):
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.data = parameter.data


def _extract(model, data, kind, **options):
    if isinstance(data, TensorDataset):
        data = DataLoader(data, batch_size=BATCH)
    options = {"progress": False, "positions": None, "tolerance": 0.0} | options
    return extract_curvature(copy.deepcopy(model), data, kind, **options)


# ---------------------------------------------------------------------------------------------
# The oracle
# ---------------------------------------------------------------------------------------------

WALKED = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)


@dataclass(frozen=True)
class Alone:
    """What passes of one sample on its own give.

    Attributes:
        logits: its own.
        jacobian: d logits / d parameter, ``(logits, *parameter)``, by name.
        uses: of each weight, by name: module, input, and d logits / d output.
    """

    logits: torch.Tensor
    jacobian: dict[str, torch.Tensor]
    uses: dict[str, list]


def _rows_of_jacobian(logits, wanted):
    """One backward pass for each logit."""
    rows = [
        torch.autograd.grad(logit, wanted, retain_graph=True, allow_unused=True)
        for logit in logits.flatten()
    ]
    return [
        torch.stack([torch.zeros_like(w) if g is None else g for g in column]).detach()
        for w, column in zip(wanted, zip(*rows, strict=True), strict=True)
    ]


def _alone(model, x, walked=None):
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    walked = walked or model
    names = dict(zip(map(id, walked.parameters()), dict(model.named_parameters()), strict=True))
    met = []

    def shift(module, arguments, output):
        zeros = torch.zeros_like(output, requires_grad=True)
        met.append((module, arguments[0].detach().clone(), zeros))
        return output + zeros

    found = []
    for sample in x:
        logits = model(sample.unsqueeze(0)).squeeze(0)
        jacobian = dict(
            zip(trained, _rows_of_jacobian(logits, list(trained.values())), strict=True)
        )
        met.clear()
        handles = [
            module.register_forward_hook(shift)
            for module in walked.modules()
            if isinstance(module, WALKED) and not hasattr(module, "parametrizations")
        ]
        by_walk = walked(sample.unsqueeze(0)).squeeze(0)
        for handle in handles:
            handle.remove()
        uses = {}
        gradients = _rows_of_jacobian(by_walk, [zeros for _, _, zeros in met]) if met else []
        for (module, seen, _), gradient in zip(met, gradients, strict=True):
            uses.setdefault(names[id(module.weight)], []).append((module, seen, gradient))
        found.append(Alone(logits.detach(), jacobian, uses))
    return found


def _joined(layer, jacobian):
    """``(logits, out, in)``, the bias last."""
    names = layer.parameter_names
    rows = jacobian[names[0]].shape[1] if jacobian[names[0]].ndim > 1 else 1
    return torch.cat([jacobian[n].reshape(len(jacobian[n]), rows, -1) for n in names], dim=2)


def _softmax_fisher(logits, label, fisher):
    """Of one categorical observation: ``diag(p) - p p'``, or the second moment of its residual."""
    p = torch.softmax(logits, dim=0)
    if fisher == "exact":
        return torch.diag(p) - torch.outer(p, p)
    residual = F.one_hot(label, len(p)) - p
    if fisher == "normalised":
        residual = residual / residual.norm()
    return torch.outer(residual, residual)


def _middles(alone, labels, fisher):
    return [_softmax_fisher(one.logits, y, fisher) for one, y in zip(alone, labels, strict=True)]


def _dense(layer, alone, middles):
    """Mean over samples of ``J' H J``."""
    total = 0.0
    for one, middle in zip(alone, middles, strict=True):
        jacobian = _joined(layer, one.jacobian).flatten(1)
        total = total + jacobian.T @ middle @ jacobian
    return total / len(alone)


def _cell(image, cell, mode):
    """The values at one place of an image, which may lie outside of it."""
    inside = []
    for place, size in zip(cell, image.shape[-len(cell) :], strict=True):
        if mode == "circular":
            place %= size
        elif mode == "reflect":
            place = -place if place < 0 else min(place, 2 * (size - 1) - place)
        elif mode == "replicate":
            place = min(max(place, 0), size - 1)
        elif not 0 <= place < size:
            return torch.zeros_like(image[(..., *[0] * len(cell))])
        inside.append(place)
    return image[(..., *inside)]


def _windows(conv, image, places):
    """What the kernel covers at each place: ``(places, *leading, elements)``."""
    if isinstance(conv.padding, str):
        reach = zip(conv.dilation, conv.kernel_size, strict=True)
        before = [d * (k - 1) // 2 * (conv.padding == "same") for d, k in reach]
    else:
        before = conv.padding
    covered = []
    for place in itertools.product(*map(range, places)):
        cells = []
        for element in itertools.product(*map(range, conv.kernel_size)):
            steps = zip(place, conv.stride, element, conv.dilation, before, strict=True)
            cell = [p * s + e * d - b for p, s, e, d, b in steps]
            cells.append(_cell(image, cell, conv.padding_mode))
        covered.append(torch.stack(cells, dim=-1))
    return torch.stack(covered)


def _walk(use, bias):
    """Sides of one use: from the input ``(places, a)``, from the gradient ``(logits, places, b)``.

    The gradient of the weight is their product over places: ``b a'``, or ``a b'`` for transposed
    convolutions and embeddings.
    """
    module, seen, gradient = use
    if isinstance(module, nn.Embedding):
        tokens, gradient = seen.flatten(), gradient.reshape(len(gradient), -1, gradient.shape[-1])
        real = tokens != (-1 if module.padding_idx is None else module.padding_idx)
        hot = F.one_hot(tokens, module.num_embeddings) * real.unsqueeze(1)
        return hot.double(), gradient * real.unsqueeze(1)
    if isinstance(module, nn.Linear):
        inputs = seen.reshape(-1, seen.shape[-1])
        gradient = gradient.reshape(len(gradient), -1, gradient.shape[-1])
    elif module.transposed:
        inputs = seen.transpose(0, 1).flatten(1).T
        windows = _windows(module, gradient.squeeze(1), seen.shape[2:])
        return inputs, windows.flatten(2).transpose(0, 1)
    else:
        inputs = torch.cat(
            [_windows(module, image, gradient.shape[3:]).flatten(1) for image in seen]
        )
        gradient = gradient.transpose(1, 2).flatten(2).mT
    if bias:
        inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
    return inputs, gradient


def _factors(layer, alone, middles):
    """K-FAC's factors ``(of the rows, of the columns)``, from a walk over positions."""
    of_inputs, of_gradients, swapped = [], [], False
    for one, middle in zip(alone, middles, strict=True):
        uses = one.uses[layer.parameter_names[0]]
        swapped = isinstance(uses[0][0], nn.Embedding) or getattr(uses[0][0], "transposed", False)
        walks = [_walk(use, len(layer.parameter_names) == 2) for use in uses]
        a, g = torch.cat([w[0] for w in walks]), torch.cat([w[1] for w in walks], dim=1)
        product = torch.einsum("pa,kpg->kag" if swapped else "pa,kpg->kga", a, g)
        # The oracle's own test: the walk makes up the gradient.
        torch.testing.assert_close(product, _joined(layer, one.jacobian), rtol=0, atol=1e-11)
        of_inputs.append(a.T @ a / len(a))
        of_gradients.append(torch.einsum("kpg,kl,lph->gh", g, middle, g))
    a, g = torch.stack(of_inputs).mean(0), torch.stack(of_gradients).mean(0)
    return (a, g) if swapped else (g, a)


def _error(found, expected):
    """The largest difference, relative to the largest entry."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def _bases(block):
    tensors = block.tensors()
    columns = tensors["column_basis"]
    return tensors.get("row_basis", torch.eye(block.shape[0], dtype=columns.dtype)), columns


def _check_ekfac(block, dense, factors):
    """Basis of the factors, spectrum of the block in it, and no farther from it than K-FAC."""
    for basis, factor in zip(_bases(block), factors, strict=True):
        torch.testing.assert_close(
            basis.T @ basis, torch.eye(len(basis), dtype=basis.dtype), rtol=0, atol=EXACT
        )
        turned = basis.T @ factor @ basis
        assert _error(turned, torch.diag(turned.diagonal())) < EXACT
    basis = torch.kron(*(basis.contiguous() for basis in _bases(block)))
    spectrum = (basis.T @ dense @ basis).diagonal().reshape(block.shape)
    assert _error(block.tensors()["spectrum"], spectrum) < EXACT
    kfac = torch.kron(*factors)
    assert (block.dense() - dense).norm() <= (kfac - dense).norm() + EXACT * dense.norm()


def _check(extracted, kind, alone, middles, exact=()):
    """Every block against the oracle; `exact` are the layers that must be diagonal."""
    seen = set()
    for layer in extracted.layers:
        block, dense = extracted.blocks[layer.name], _dense(layer, alone, middles)
        diagonal = dense.diagonal().reshape(layer.shape)
        if kind == "dense":
            assert _error(block.dense(), dense) < EXACT, layer.name
        elif kind == "diagonal" or block.kind == "diagonal":
            seen.add(layer.name)
            assert _error(block.tensors()["values"], diagonal) < EXACT, layer.name
        elif kind == "kfac":
            rows, columns = _factors(layer, alone, middles)
            tensors = block.tensors()
            if "row_values" in tensors:
                assert _error(torch.diag(tensors["row_values"]), rows) < EXACT, layer.name
            else:
                assert _error(tensors["row_factor"], rows) < EXACT, layer.name
            assert _error(tensors["column_factor"], columns) < EXACT, layer.name
        else:
            _check_ekfac(block, dense, _factors(layer, alone, middles))
    if kind in ("kfac", "ekfac"):
        assert seen == set(exact)


# ---------------------------------------------------------------------------------------------
# Layer types
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", ["exact", "normalised"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("net", NETS)
def test_blocks_match_the_oracle(net, kind, fisher):
    model, data, alone = _setting(net)
    found = _extract(model, data, kind, fisher=fisher)
    middles = _middles(alone, data.tensors[1], fisher)
    _check(found, kind, alone, middles, NETS[net].exact)


@pytest.mark.parametrize("net", NETS)
def test_every_trained_parameter_is_covered_once_and_reported(net):
    model, data, _ = _setting(net)
    found = _extract(model, data, "kfac")
    _check_coverage(model, found)
    kinds = {report.layer.name: report.kind for report in found.layer_reports}
    assert {name for name, kind in kinds.items() if kind == "diagonal"} == set(NETS[net].exact)


def _check_coverage(model, found):
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert Counter(found.parameter_names) == Counter(trained)
    layers = [layer.name for layer in found.layers]
    assert sorted(found.blocks) == sorted(layers)
    assert [report.layer.name for report in found.layer_reports] == layers
    for report in found.layer_reports:
        assert report.kind == found.blocks[report.layer.name].kind
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    *lines, last = found.report.splitlines()
    none = "no output layer: the logits are no layer's outputs"
    assert last == (f"output layer: {found.output_layer}" if found.output_layer else none)
    assert sum(int(line.split(" weights")[0].split()[-1]) for line in lines) == weights
    assert {line.split(" (")[0] for line in lines} == {t.kind for t in found.layer_reports}
    for report in found.layer_reports:
        assert any(report.backend in line and report.reason in line for line in lines)


@pytest.mark.parametrize("net", ["linear", "layer norm", "class token", "attention by hand"])
def test_the_oracle_agrees_with_functional_jacobians(net):
    model, data, alone = _setting(net)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def logits_of(parameters, sample):
        return functional_call(model, parameters, (sample.unsqueeze(0),)).squeeze(0)

    jacobians = vmap(jacrev(logits_of), in_dims=(None, 0))(parameters, data.tensors[0])
    for name, jacobian in jacobians.items():
        own = torch.stack([one.jacobian[name] for one in alone])
        torch.testing.assert_close(own, jacobian, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "net",
    [
        "positions",
        "embedding",
        "attention, samples first",
        "module called twice",
        "Conv2d(bias=False, stride=3)",
        "ConvTranspose1d(stride=2, padding=1)",
    ],
)
def test_a_second_pass_for_ekfac_changes_nothing(net, monkeypatch):
    model, data, alone = _setting(net)
    monkeypatch.setattr(second_moments, "_KEPT_BYTES", 0)
    found = _extract(model, data, "ekfac", fisher="exact")
    middles = _middles(alone, data.tensors[1], "exact")
    _check(found, "ekfac", alone, middles, NETS[net].exact)


@pytest.mark.parametrize("net", ["positions", "class token", "embedding", "layer norm"])
def test_all_kinds_at_once_are_the_kinds_one_by_one(net):
    model, data, alone = _setting(net)
    loader = DataLoader(data, batch_size=BATCH)
    middles = _middles(alone, data.tensors[1], "exact")
    options = {"fisher": "exact", "tolerance": 0.0, "positions": None, "progress": False}
    for kind, found in extract_curvatures(copy.deepcopy(model), loader, KINDS, **options).items():
        _check(found, kind, alone, middles, NETS[net].exact)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        # The places of a sample that comes alone cannot be told: no Kronecker factors then.
        *((kind, (1, 4)) for kind in ("diagonal", "dense")),
        *((kind, sizes) for kind in ("diagonal", "ekfac") for sizes in ((4, 1), (2, 3))),
    ],
)
@pytest.mark.parametrize(
    "net",
    [
        "positions folded",
        "positions folded first",
        "4 positions first, mean",
        "attention, samples first",
        "embedding positions first",
    ],
)
def test_batches_of_any_sizes(net, kind, sizes):
    """A list of batches, of which the first tells where the samples are."""
    model, data, alone = _setting(net)
    x, y = data.tensors
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    found = _extract(model, batches, kind, fisher="normalised")
    _check(found, kind, alone, _middles(alone, y, "normalised"), NETS[net].exact)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pool", [0, 1])
def test_as_many_positions_as_samples(pool, kind, samples):
    """Positions first, of which one matters: its place must not pass for the sample's."""
    case = Case(lambda: _positions_first(lambda x: x[pool]), (2, 3))
    x = _inputs(case, samples)
    model = _generic(case.build(), x)
    y = torch.zeros(samples, dtype=torch.long)
    found = _extract(model, TensorDataset(x, y), kind, fisher="normalised")
    alone = _alone(model, x)
    _check(found, kind, alone, _middles(alone, y, "normalised"))


@pytest.mark.parametrize("net", ["positions folded first", "4 positions first, mean"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", range(4))
def test_a_sample_without_gradient(place, kind, net):
    """One of those that are looked at first: it does not tell where the samples are."""
    case = NETS[net]
    x = _inputs(case)
    x[place, 0, 0] = 0.0
    inner = case.build()
    gated = _Net(lambda net, x: net.inner(x) * (x[:, 0, :1] != 0), inner=inner)
    model = _generic(gated, x)
    y = torch.arange(SAMPLES) % CLASSES
    found = _extract(model, TensorDataset(x, y), kind, fisher="normalised")
    alone = _alone(model, x)
    exact = {f"inner.{name}" for name in case.exact}
    _check(found, kind, alone, _middles(alone, y, "normalised"), exact)


# ---------------------------------------------------------------------------------------------
# Likelihoods
# ---------------------------------------------------------------------------------------------

SEED, DRAWS = 11, 2


def _token_model():
    def forward(net, x):
        return net.head(torch.tanh(net.mix(net.embed(x)))).transpose(1, 2)

    return _Net(forward, embed=nn.Embedding(5, 3), mix=nn.Linear(3, 4), head=nn.Linear(4, 4))


def _segmentation():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.ConvTranspose2d(3, 3, 2, bias=False)
    )


def _some_ignored(labels):
    labels = labels.clone()
    labels.view(len(labels), -1)[:, ::3] = -100
    labels[2] = -100  # a sample of which nothing is observed
    return labels


@dataclass(frozen=True)
class Observed:
    """A likelihood: a network, and how its labels come about from a generator."""

    case: Case
    likelihood: str
    labels: Callable


LIKELIHOODS = {
    "classes": Observed(
        Case(lambda: _mlp()), "categorical", lambda g: torch.randint(0, 3, (SAMPLES,), generator=g)
    ),
    "tokens": Observed(
        Case(_token_model, (3,), 5),
        "categorical",
        lambda g: _some_ignored(torch.randint(0, 4, (SAMPLES, 3), generator=g)),
    ),
    "segmentation": Observed(
        Case(_segmentation, (2, 2, 1)),
        "categorical",
        lambda g: _some_ignored(torch.randint(0, 3, (SAMPLES, 3, 2), generator=g)),
    ),
    "several labels": Observed(
        Case(lambda: _mlp()),
        "bernoulli",
        lambda g: torch.randint(0, 2, (SAMPLES, 3), generator=g).double(),
    ),
    "one label": Observed(
        Case(lambda: nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 1), nn.Flatten(0))),
        "bernoulli",
        lambda g: torch.rand(SAMPLES, generator=g, dtype=torch.float64),
    ),
    "regression": Observed(
        Case(lambda: _mlp()),
        "gaussian",
        lambda g: torch.randn(SAMPLES, 3, generator=g, dtype=torch.float64),
    ),
    "regression over an image": Observed(
        Case(_segmentation, (2, 2, 1)),
        "gaussian",
        lambda g: torch.randn(SAMPLES, 3, 3, 2, generator=g, dtype=torch.float64),
    ),
}


def _observations(logits, label, likelihood):
    """Of one sample: the indices of each observation's logits, its logits and its label."""
    index = torch.arange(logits.numel()).view(logits.shape)
    if likelihood != "categorical":
        flat = zip(index.flatten(), logits.flatten(), label.flatten(), strict=True)
        return [(i.view(1), z.view(1), y) for i, z, y in flat]
    classes = len(logits)
    columns = zip(
        index.view(classes, -1).T, logits.view(classes, -1).T, label.view(-1), strict=True
    )
    return list(columns)


def _observed_residual(z, y, likelihood):
    if likelihood == "categorical":
        return F.one_hot(y.clamp_min(0), len(z)) - torch.softmax(z, 0)
    return y - (torch.sigmoid(z) if likelihood == "bernoulli" else z)


def _observed_covariance(z, likelihood):
    if likelihood == "categorical":
        return _softmax_fisher(z, None, "exact")
    if likelihood == "bernoulli":
        p = torch.sigmoid(z)
        return torch.diag(p * (1 - p))
    return torch.eye(1, dtype=z.dtype)


def _drawn_label(z, u, likelihood):
    if likelihood == "categorical":
        cumulative = torch.softmax(z, 0).cumsum(0)
        return torch.tensor(int((cumulative <= u * cumulative[-1]).sum()))
    if likelihood == "bernoulli":
        return torch.tensor(float(u < torch.sigmoid(z).item()))
    return z + NormalDist().inv_cdf(u)


def _unit(z, y, likelihood):
    """A residual of unit length; one entry has a sign only, which plays no part."""
    if likelihood != "categorical":
        return torch.ones(1, dtype=z.dtype)
    residual = _observed_residual(z, y, likelihood)
    return residual / residual.norm()


def _sample_middle(logits, label, likelihood, fisher, uniforms=None):
    """The Fisher of one sample's logits; with ``uniforms`` (draws, observations), as drawn."""
    size = logits.numel()
    seen = _observations(logits, label, likelihood)

    def whole(parts):
        vector = torch.zeros(size, dtype=logits.dtype)
        for (index, _, y), part in zip(seen, parts, strict=True):
            vector[index] = part * float(y != -100 or likelihood != "categorical")
        return torch.outer(vector, vector)

    if fisher == "empirical":
        return whole([_observed_residual(z, y, likelihood) for _, z, y in seen])
    if uniforms is not None:
        total = torch.zeros(size, size, dtype=logits.dtype)
        for draw in uniforms:
            if fisher == "mc":
                labels = [
                    _drawn_label(z, u, likelihood) for (_, z, _), u in zip(seen, draw, strict=True)
                ]
                residuals = [
                    _observed_residual(z, y, likelihood)
                    for (_, z, _), y in zip(seen, labels, strict=True)
                ]
            else:
                residuals = [
                    _unit(z, y, likelihood) * (1 if u < 0.5 else -1)
                    for (_, z, y), u in zip(seen, draw, strict=True)
                ]
            total += whole(residuals) / len(uniforms)
        return total
    total = torch.zeros(size, size, dtype=logits.dtype)
    for index, z, y in seen:
        if likelihood == "categorical" and y == -100:
            continue
        if fisher == "exact":
            total[index[:, None], index] = _observed_covariance(z, likelihood)
        else:
            unit = _unit(z, y, likelihood)
            total[index[:, None], index] = torch.outer(unit, unit)
    return total


@functools.cache
def _observed_setting(name):
    observed = LIKELIHOODS[name]
    x = _inputs(observed.case)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = _generic(observed.case.build(), x)
    labels = observed.labels(torch.Generator().manual_seed(5))
    return model, TensorDataset(x, labels), _alone(model, x)


@pytest.mark.parametrize("fisher", ["exact", "empirical", "normalised", "mc"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihoods_match_the_oracle(name, kind, fisher):
    model, data, alone = _observed_setting(name)
    likelihood = LIKELIHOODS[name].likelihood
    middles = []
    for place, (one, label) in enumerate(zip(alone, data.tensors[1], strict=True)):
        observations = len(_observations(one.logits, label, likelihood))
        uniforms = None
        if fisher == "mc" or (fisher == "normalised" and observations > 1):
            drawn = np.random.default_rng((SEED, place)).random(DRAWS * observations)
            uniforms = drawn.reshape(DRAWS, observations)
        middles.append(_sample_middle(one.logits, label, likelihood, fisher, uniforms))
    options = {"likelihood": likelihood, "fisher": fisher, "draws": DRAWS, "seed": SEED}
    found = _extract(model, data, kind, **options)
    _check(found, kind, alone, middles)


@pytest.mark.parametrize("name", ["classes", "tokens", "several labels", "regression"])
@pytest.mark.parametrize("fisher", ["mc", "normalised"])
def test_draws_have_the_expectation_of_their_type(name, fisher):
    model, data, alone = _observed_setting(name)
    likelihood = LIKELIHOODS[name].likelihood
    expected = "exact" if fisher == "mc" else "normalised"
    middles = [
        _sample_middle(one.logits, label, likelihood, expected)
        for one, label in zip(alone, data.tensors[1], strict=True)
    ]
    found = _extract(model, data, "dense", likelihood=likelihood, fisher=fisher, draws=400)
    for layer in found.layers:
        dense = _dense(layer, alone, middles)
        far = (found.blocks[layer.name].dense() - dense).norm() / dense.norm()
        assert far < 0.2, layer.name


@pytest.mark.parametrize("name", ["tokens", "segmentation"])
def test_ignored_positions_play_no_part(name):
    """What a model says at a position that is not observed changes nothing."""
    model, data, _ = _observed_setting(name)

    def shouted(net, batch):
        logits = net(batch[0])
        return logits + 3.0 * (batch[1] == -100).unsqueeze(1) * logits, batch[1]

    for fisher in ("exact", "empirical", "normalised"):
        plain = _extract(model, data, "diagonal", fisher=fisher)
        loud = _extract(model, data, "diagonal", fisher=fisher, forward=shouted)
        for name, block in plain.blocks.items():
            assert _error(loud.blocks[name].diagonal(), block.diagonal()) < EXACT


# ---------------------------------------------------------------------------------------------
# Closed cases
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_kronecker_blocks_of_deep_linear_nets_are_exact(kind, bias):
    """Gradients that do not depend on the sample: the block is a Kronecker product."""
    layers = [nn.Linear(4, 3, bias), nn.Linear(3, 3, bias), nn.Linear(3, 2, bias)]
    model, x = nn.Sequential(*layers).double(), _inputs(Case(None))
    alone = _alone(model, x)
    data = TensorDataset(x, torch.zeros(SAMPLES, 2, dtype=torch.float64))
    found = _extract(model, data, kind, likelihood="gaussian", fisher="exact")
    for layer in found.layers:
        dense = _dense(layer, alone, [torch.eye(2, dtype=torch.float64)] * SAMPLES)
        assert _error(found.blocks[layer.name].dense(), dense) < EXACT


@pytest.mark.parametrize("fisher", ["exact", "normalised"])
@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
@pytest.mark.parametrize(
    "net",
    {
        "linear": Case(lambda: _mlp(nn.Linear(4, 4), nn.ReLU())),
        "one window": Case(lambda: _image(nn.Conv2d(2, 3, (5, 4))), IMAGE),
        "one token": NETS["embedding of one token"],
        "one place": Case(lambda: _image(nn.ConvTranspose2d(2, 3, 2, bias=False)), (2, 1, 1)),
    }.items(),
    ids=lambda item: item[0],
)
def test_kronecker_blocks_of_one_sample_without_sharing_are_exact(net, kind, fisher):
    case = net[1]
    x, y = _inputs(case, samples=1), torch.tensor([1])
    model = _generic(case.build(), x)
    alone = _alone(model, x)
    found = _extract(model, TensorDataset(x, y), kind, fisher=fisher)
    middles = _middles(alone, y, fisher)
    for layer in found.layers:
        assert found.blocks[layer.name].kind != "diagonal"
        dense = _dense(layer, alone, middles)
        assert _error(found.blocks[layer.name].dense(), dense) < EXACT


def _random_net(seed):
    rng = np.random.default_rng(seed)
    activation = [nn.Tanh, nn.ReLU, nn.GELU, nn.Identity][rng.integers(4)]
    bias, width = bool(rng.integers(2)), int(rng.integers(2, 5))
    first = {
        0: (nn.Linear(3, width, bias), (3,)),
        1: (nn.Linear(2, width, bias), (int(rng.integers(2, 4)), 2)),
        2: (nn.Conv1d(2, width, 2, int(rng.integers(1, 3)), bias=bias), (2, 5)),
        3: (nn.Conv2d(1, width, 2, padding=int(rng.integers(2)), bias=bias), (1, 3, 3)),
        4: (nn.ConvTranspose1d(2, width, 2, int(rng.integers(1, 3)), bias=False), (2, 3)),
    }
    layer, shape = first[seed % 5]
    net = nn.Sequential(layer, activation(), nn.Flatten(), nn.LazyLinear(2, bias), nn.LazyLinear(3))
    return net, shape, ("exact", "empirical", "normalised")[rng.integers(3)]


@pytest.mark.parametrize("seed", range(40))
def test_ekfac_is_never_farther_from_the_block_than_kfac(seed):
    torch.manual_seed(seed)
    net, shape, fisher = _random_net(seed)
    x = _inputs(Case(None, shape), seed=seed)
    model = _generic(net, x)
    y = torch.arange(SAMPLES) % 3
    alone = _alone(model, x)
    found = {kind: _extract(model, TensorDataset(x, y), kind, fisher=fisher) for kind in KINDS}
    middles = _middles(alone, y, fisher)
    closer = 0
    for layer in found["ekfac"].layers:
        dense = _dense(layer, alone, middles)
        far = {
            kind: (extracted.blocks[layer.name].dense() - dense).norm() / dense.norm()
            for kind, extracted in found.items()
        }
        assert far["dense"] < EXACT
        assert far["ekfac"] <= far["kfac"] + EXACT
        closer += bool(far["ekfac"] < far["kfac"] - 1e-6)
        trace = found["ekfac"].blocks[layer.name].trace()
        torch.testing.assert_close(trace, dense.trace(), rtol=EXACT, atol=0)
    assert closer  # or the comparison says nothing


# ---------------------------------------------------------------------------------------------
# Real models
# ---------------------------------------------------------------------------------------------


def _vision_transformer():
    return torchvision.models.VisionTransformer(
        image_size=32,
        patch_size=16,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=12,
        num_classes=5,
    )


def _convnext():
    widths = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, 24, 1), CNBlockConfig(24, None, 2)]
    return torchvision.models.ConvNeXt(widths, num_classes=5)


class _TextClassifier(_Encoder):
    """The text classifier at a size that is used."""

    def __init__(self, batch_first):
        super().__init__(batch_first)
        self.embed = nn.Embedding(200, 64, padding_idx=0)
        self.places = nn.Parameter(torch.zeros(12, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(64, 5)


@dataclass(frozen=True)
class Real:
    """A real model, and how its layers must be treated under K-FAC.

    Attributes:
        build: makes it.
        kronecker: how many layers have a Kronecker block.
        tokens: whether its inputs are tokens.
    """

    build: Callable[[], nn.Module]
    kronecker: int
    tokens: bool = False


REAL = {
    "resnet18": Real(lambda: torchvision.models.resnet18(num_classes=5), 21),
    "mobilenet_v3_small": Real(lambda: torchvision.models.mobilenet_v3_small(num_classes=5), 43),
    "convnext": Real(_convnext, 12),
    "vision transformer": Real(_vision_transformer, 10),
    "text, samples first": Real(lambda: _TextClassifier(True), 10, True),
    "text, positions first": Real(lambda: _TextClassifier(False), 10, True),
}


@functools.cache
def _real_setting(name, samples=2):
    """A real model in float64, data, and the squares of each sample's gradient on its own."""
    real = REAL[name]
    generator = torch.Generator().manual_seed(0)
    if real.tokens:
        x = torch.randint(1, 200, (samples, 12), generator=generator)
        x[0, 9:] = 0
    else:
        x = torch.randn(samples, 3, 32, 32, generator=generator)
    y = torch.arange(samples) % 5
    with torch.random.fork_rng():
        torch.manual_seed(6)
        model = real.build().double().eval()
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if parameter.ndim == 1 or parameter.std() < 1e-5 or "layer_scale" in part:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for part, buffer in model.named_buffers():
            if part.endswith("running_var"):
                buffer.mul_(0.3)
    squares = {part: torch.zeros_like(p) for part, p in model.named_parameters()}
    for sample, label in zip(x, y, strict=True):
        whole = sample.unsqueeze(0)
        logits = model(whole if real.tokens else whole.double()).squeeze(0)
        residual = F.one_hot(label, 5) - torch.softmax(logits.detach(), 0)
        scalar = (logits * residual / residual.norm()).sum()
        gradients = torch.autograd.grad(scalar, list(model.parameters()))
        for square, gradient in zip(squares.values(), gradients, strict=True):
            square += gradient**2 / samples
    return model, TensorDataset(x, y), squares


@pytest.mark.parametrize("kind", ["diagonal", "kfac"])
@pytest.mark.parametrize("name", REAL)
def test_real_models(name, kind):
    real, (model, data, squares) = REAL[name], _real_setting(name)
    found = _extract(model, data, kind, fisher="normalised")
    _check_coverage(model, found)
    diagonal = 0
    for layer, report in zip(found.layers, found.layer_reports, strict=True):
        assert report.backend == "hooks", layer.name
        block = found.blocks[layer.name]
        assert all(bool(tensor.isfinite().all()) for tensor in block.tensors().values())
        if block.kind == "diagonal":
            diagonal += 1
            expected = torch.cat(
                [squares[n].reshape(layer.shape[0], -1) for n in layer.parameter_names], dim=1
            )
            assert _error(block.tensors()["values"], expected) < 1e-9, layer.name
    expected = len(found.layers) - (real.kronecker if kind == "kfac" else 0)
    assert diagonal == expected


# ---------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------


def _reentrant(net, x):
    return net.head(checkpoint(net.body, net.first(x), use_reentrant=True))


def _three(forward, **options):
    parts = {name: nn.Linear(4, 4) for name in ("first", "body")}
    return _Net(forward, **parts, head=_head(4), **options)


def _overlapping():
    net = _three(lambda net, x: net.head(net.body(net.first(x))))
    whole = torch.randn(6, 4)
    net.first.weight, net.body.weight = nn.Parameter(whole[:4]), nn.Parameter(whole[2:])
    return net


def _with_loss(loss):
    return _three(lambda net, x: net.head(net.body(net.first(x))), loss=loss)


def _normed(norm, *shape):
    return nn.Sequential(
        nn.Unflatten(1, shape) if shape else nn.Identity(), norm, nn.Flatten(), nn.Linear(4, 3)
    )


REFUSED = {
    "statistics of the batch": (
        lambda: _normed(nn.BatchNorm1d(4, track_running_stats=False)),
        r"\b1\b",
    ),
    "statistics of the batch, nothing trained": (
        lambda: _normed(nn.BatchNorm1d(4, track_running_stats=False, affine=False)),
        r"\b1\b",
    ),
    "statistics of the batch in two dimensions": (
        lambda: _normed(nn.BatchNorm2d(1, track_running_stats=False), 1, 2, 2),
        r"\b1\b",
    ),
    "reentrant checkpointing": (lambda: _three(_reentrant), r"\bbody\b"),
    "overlapping": (_overlapping, r"first\.weight and body\.weight"),
    **{
        f"class weights of {type(loss).__name__}": (
            functools.partial(_with_loss, loss),
            rf"\bloss\b.*{type(loss).__name__}",
        )
        for loss in (
            nn.CrossEntropyLoss(torch.ones(3)),
            nn.NLLLoss(torch.ones(3)),
            nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)),
        )
    },
}


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")
@pytest.mark.parametrize("fisher", ["exact", "normalised"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_offender(name, kind, fisher):
    build, words = REFUSED[name]
    data = TensorDataset(_inputs(Case(None)).float(), torch.arange(SAMPLES) % 3)
    loader = DataLoader(data, batch_size=BATCH)
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        # No copy, which would take apart what overlaps.
        extract_curvature(build(), loader, kind, fisher=fisher, progress=False)
    assert len(caught.value.offenders) == 1
