"""Curvature against an independent oracle, and the promises extraction makes to its caller."""

import copy
import functools
import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from backpack.context import CTX
from torch import nn
from torch.func import jacrev
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_fedfisher.curvature.dense import Dense
from lightning_fedfisher.distributed.processes import Shard
from lightning_fedfisher.errors import UnsupportedModelError
from lightning_fedfisher.extraction.accumulators import model_sums as second_moments
from lightning_fedfisher.extraction.extract import extract_curvature, extract_curvatures
from lightning_fedfisher.extraction.fisher_types import FISHER_TYPES
from lightning_fedfisher.layers import find_layers

CLASSES, SAMPLES, BATCH = 3, 7, 3
MC = {"draws": 3, "seed": 5, "tolerance": 0.0}
EXTRACTED = ("diagonal", "dense", "kfac", "ekfac")

# ---------------------------------------------------------------------------------------------
# Networks: what they are made of, and the shape of one input
# ---------------------------------------------------------------------------------------------


class _Net(nn.Module):
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

    return _Net(
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

    return _Net(
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
    return _Net(
        lambda net, x: net.head(torch.tanh(net.mix(torch.tanh(net.embed(x)))).mean(1)),
        embed=nn.Linear(5, 4),
        mix=nn.Linear(4, 4, bias=False),
        head=nn.Linear(4, CLASSES),
    )


def _channels_last():
    return _Net(
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

    return _Net(
        forward,
        first=nn.Conv2d(2, 3, 3, padding=1),
        second=nn.Conv2d(3, 2, 3, padding=1),
        head=nn.Linear(128, CLASSES),
    )


def _called_twice():
    return _Net(
        lambda net, x: net.head(torch.tanh(net.body(torch.tanh(net.body(x))))),
        body=nn.Linear(4, 4),
        head=nn.Linear(4, CLASSES),
    )


def _tied(own_biases):
    net = _Net(
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
    return _Net(forward, embed=nn.Embedding(6, 4, **options), mix=nn.Linear(4, 4), **modules)


def _positions_embedded():
    return _Net(
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

    return _Net(
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
    return _Net(
        lambda net, x: net.head(net.cell(x)[0][:, -1]),
        cell=nn.LSTM(5, 3, batch_first=True),
        head=nn.Linear(3, CLASSES),
    )


def _bare():
    net = _Net(lambda net, x: torch.tanh(x @ net.first) @ net.second.T + net.third)
    net.first = nn.Parameter(torch.randn(4, 5))
    net.second = nn.Parameter(torch.randn(CLASSES, 5))
    net.third = nn.Parameter(torch.randn(CLASSES))
    return net


def _weights_alone():
    return _Net(
        lambda net, x: net.head(F.linear(torch.tanh(net.body(x)), net.body.weight.T)),
        body=nn.Linear(4, 4),
        head=nn.Linear(4, CLASSES),
    )


class _Standardised(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight / self.weight.norm(), self.bias)


class _Scaled(nn.Linear):
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
        lambda: _Net(
            lambda net, x: torch.tanh(net.embed(x.transpose(0, 1))).mean(0),
            embed=nn.Linear(5, CLASSES),
        ),
        SEQUENCE,
    ),
    "positions flattened": (
        lambda: _Net(
            lambda net, x: torch.tanh(net.embed(x.flatten(0, 1))).unflatten(0, x.shape[:2]).mean(1),
            embed=nn.Linear(5, CLASSES),
        ),
        SEQUENCE,
    ),
    "frames flattened": (
        lambda: _Net(
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
    "scaled": (lambda: nn.Sequential(_Scaled(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)), VECTOR),
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
# Linear maps of nn.MultiheadAttention, which calls no module of theirs: only
# test_attention_is_the_linear_maps_it_is_made_of has their factors.
ATTENTION = ("in_proj_weight", "out_proj")


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


def _net(net):
    return copy.deepcopy(_cached_net(net))


def _data(shape, samples=SAMPLES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, *shape, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, CLASSES, (samples,), generator=generator))


def _extract(model, data, kind="kfac", **options):
    if isinstance(data, TensorDataset):
        data = DataLoader(data, batch_size=BATCH)
    return extract_curvature(model, data, kind, **{"progress": False} | options)


# ---------------------------------------------------------------------------------------------
# The oracle: Jacobians of each sample's logits, and the definition of the Fisher in logit space
# ---------------------------------------------------------------------------------------------


KRONECKER = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose2d,
    nn.Embedding,
)


def _reference_modules(net, model):
    """Modules whose layer has Kronecker factors, by the layer's name."""
    modules = {}
    for layer in find_layers(model):
        module = model.get_submodule(layer.module_name)
        has = isinstance(module, KRONECKER) and getattr(module, "groups", 1) == 1
        weight = layer.parameter_names[0].endswith("weight")
        if has and weight and layer.name not in USED_OTHERWISE.get(net, ()):
            modules[layer.name] = module
    return modules


def _reference_logit_fisher(logits, labels, fisher):
    """The Fisher with respect to each sample's logits, ``(samples, classes, classes)``."""
    p = torch.softmax(logits, dim=1)
    if fisher == "exact":
        return torch.stack([torch.diag(row) - torch.outer(row, row) for row in p])
    if fisher == "mc":
        uniforms = [
            np.random.default_rng((MC["seed"], place)).random(MC["draws"])
            for place in range(len(logits))
        ]
        cumulative = p.cumsum(1).numpy()
        drawn = [[int((cumulative[i] <= u).sum()) for u in uniforms[i]] for i in range(len(logits))]
        residuals = torch.eye(CLASSES, dtype=p.dtype)[torch.tensor(drawn)] - p.unsqueeze(1)
        return torch.einsum("snc,snd->scd", residuals, residuals) / MC["draws"]
    residual = torch.eye(CLASSES, dtype=p.dtype)[labels] - p
    moment = torch.einsum("sc,sd->scd", residual, residual)
    return moment / (residual**2).sum(1)[:, None, None] if fisher == "normalised" else moment


def _reference_jacobians(model, x):
    """d logits / d parameters of each layer, ``(samples, classes, out, in)``, bias last."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    by_sample = []
    for sample in x:
        logits = model(sample.unsqueeze(0)).squeeze(0)
        rows = [
            torch.autograd.grad(v, list(parameters.values()), retain_graph=True) for v in logits
        ]
        by_sample.append([torch.stack(gradients) for gradients in zip(*rows, strict=True)])
    jacobians = dict(zip(parameters, map(torch.stack, zip(*by_sample, strict=True)), strict=True))
    return {
        layer.name: torch.cat(
            [
                jacobians[name].reshape(len(x), CLASSES, layer.shape[0], -1)
                for name in layer.parameter_names
            ],
            dim=3,
        )
        for layer in find_layers(model)
    }


def _reference_windows(module, image, places):
    """What a kernel covers at each place of a padded image: ``(places, channels * elements)``."""
    spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    padding = module.padding
    if isinstance(padding, str):
        padding = [span // 2 if padding == "same" else 0 for span in spans]
    channels, *sizes = image.shape
    if getattr(module, "padding_mode", "zeros") == "circular":
        padded = F.pad(image[None], [p for p in reversed(padding) for _ in range(2)], "circular")[0]
    else:
        padded = image.new_zeros(
            channels, *(n + 2 * s + 6 for n, s in zip(sizes, spans, strict=True))
        )
        inside = tuple(slice(p, p + n) for p, n in zip(padding, sizes, strict=True))
        padded[(slice(None), *inside)] = image
    windows = []
    for place in itertools.product(*map(range, places)):
        window = tuple(
            slice(i * s, i * s + span + 1, d)
            for i, s, span, d in zip(place, module.stride, spans, module.dilation, strict=True)
        )
        windows.append(padded[(slice(None), *window)].flatten())
    return torch.stack(windows)


def _reference_inputs(module, x, output, columns):
    """What the inputs contribute at each position: ``(positions, in)``, tokens as unit vectors."""
    weight = module.weight.detach()
    if isinstance(module, nn.Embedding):
        return F.one_hot(x.flatten(), len(weight)).to(weight) * (
            1 if module.padding_idx is None else (x.flatten() != module.padding_idx)[:, None]
        )
    if isinstance(module, nn.ConvTranspose2d):
        return x[0].flatten(1).T
    if isinstance(module, nn.Linear):
        rows, seen = x.reshape(-1, x.shape[-1]), output.reshape(-1, output.shape[-1])
    else:
        rows = torch.cat([_reference_windows(module, one, output.shape[2:]) for one in x])
        seen = torch.cat([one.flatten(1).T for one in output])
    weight = weight.flatten(1)
    if module.bias is not None:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        weight = torch.cat([weight, module.bias.detach().unsqueeze(1)], dim=1)
    seen = seen / 2 if isinstance(module, _Scaled) else seen
    torch.testing.assert_close(rows @ weight.T, seen, rtol=0, atol=1e-12)  # the oracle's own test
    return rows[:, :columns]  # without a bias that is frozen, or another layer's


def _reference_gradients(module, x, jacobian):
    """What d logits / d output contributes at each position: ``(classes, features, positions)``."""
    if isinstance(module, nn.ConvTranspose2d):
        windows = [_reference_windows(module, one, x.shape[2:]).T for one in jacobian[:, 0]]
        return torch.stack(windows)
    if isinstance(module, nn.Linear | nn.Embedding):
        features = jacobian.reshape(CLASSES, -1, jacobian.shape[-1]).mT
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            features = features * (x.flatten() != module.padding_idx)
        return features * (2 if isinstance(module, _Scaled) else 1)
    return jacobian.movedim(2, 1).flatten(2)


def _reference_sides(net, model, sample):
    """Of one sample and each layer: both sides of its gradient, over the positions of all calls."""
    calls, shifts = [], []
    names = {module: name for name, module in _reference_modules(net, model).items()}
    tied = {id(module.weight): name for module, name in reversed(list(names.items()))}

    def record(module, args, output):
        # Clones, since what follows may work in place.
        calls.append((module, args[0].detach().clone(), output.detach().clone()))

    def shift(module, args, output):
        return output + next(shifts)

    def logits_of(zeros):
        nonlocal shifts
        shifts = iter(zeros)
        return model(sample.unsqueeze(0)).squeeze(0)

    called = [m for m in model.modules() if id(getattr(m, "weight", None)) in tied]
    handles = [module.register_forward_hook(record) for module in called]
    model(sample.unsqueeze(0))
    for handle in handles:
        handle.remove()
    if not calls:
        return {}
    handles = [module.register_forward_hook(shift) for module in called]
    jacobians = jacrev(logits_of)(tuple(torch.zeros_like(output) for _, _, output in calls))
    for handle in handles:
        handle.remove()
    columns = {layer.name: layer.shape[1] for layer in find_layers(model)}
    sides = {}
    for (module, x, output), jacobian in zip(calls, jacobians, strict=True):
        name = tied[id(module.weight)]
        inputs = _reference_inputs(module, x, output, columns[name])
        gradients = _reference_gradients(module, x, jacobian.detach())
        sides.setdefault(name, []).append((inputs, gradients))
    return {
        name: (torch.cat([i for i, _ in found]), torch.cat([g for _, g in found], dim=2))
        for name, found in sides.items()
    }


@functools.cache
def _reference_pass(net, samples=SAMPLES):
    model = _net(net).eval()
    x, _ = _data(NETS[net][1], samples).tensors
    with torch.no_grad():
        logits = torch.cat([model(sample.unsqueeze(0)) for sample in x])
    jacobians = _reference_jacobians(model, x)
    sides = [_reference_sides(net, model, sample) for sample in x]
    return logits, jacobians, sides


def _reference_factors(net, model, name, sides, middle):
    inputs = torch.stack([i.T @ i / len(i) for i, _ in sides]).mean(0)
    gradients = torch.stack(
        [torch.einsum("cot,cd,dpt->op", j, m, j) for (_, j), m in zip(sides, middle, strict=True)]
    ).mean(0)
    module = _reference_modules(net, model)[name]
    if isinstance(module, nn.Embedding):
        return {"row_values": inputs.diagonal(), "column_factor": gradients}
    if isinstance(module, nn.ConvTranspose2d):
        return {"row_factor": inputs, "column_factor": gradients}
    return {"row_factor": gradients, "column_factor": inputs}


def _reference_blocks(net, kind, fisher, samples=SAMPLES):
    """The tensors of each layer's block, from definitions alone."""
    logits, jacobians, sides = _reference_pass(net, samples)
    labels = _data(NETS[net][1], samples).tensors[1]
    middle = _reference_logit_fisher(logits, labels, fisher)
    model = _net(net)
    factored = _reference_modules(net, model) if kind == "kfac" else {}
    blocks = {}
    for name, jacobian in jacobians.items():
        if kind == "kfac" and name.endswith(ATTENTION):
            continue
        if name in factored:
            own = [side[name] for side in sides]
            blocks[name] = _reference_factors(net, model, name, own, middle)
        else:
            flat = jacobian.flatten(2)
            dense = torch.einsum("sci,scd,sdj->ij", flat, middle, flat) / len(flat)
            diagonal = dense.diagonal().reshape(jacobian.shape[2:])
            blocks[name] = {"matrix": dense} if kind == "dense" else {"values": diagonal}
    return blocks


def _tensors(block):
    """What a block holds; of an eigendecomposition, which is not unique, what it stands for."""
    return {"matrix": block.dense()} if "ekfac" in block.kind else block.tensors()


def _relative_error(extracted, expected):
    """The largest error of any tensor, relative to the largest entry of that tensor."""
    assert {n for n in extracted.blocks if not n.endswith(ATTENTION)} <= set(expected)
    worst = 0.0
    for name, tensors in expected.items():
        found = _tensors(extracted.blocks[name])
        assert set(found) == set(tensors), name
        for field, tensor in tensors.items():
            assert found[field].shape == tensor.shape
            error = (found[field].double() - tensor).abs().max() / tensor.abs().max()
            worst = max(worst, float(error))
    return worst


def _same(one, two, tolerance=0.0):
    expected = {name: _tensors(block) for name, block in two.blocks.items()}
    return _relative_error(one, expected) <= tolerance


every_net = pytest.mark.parametrize("net", NETS)
kronecker_kinds = pytest.mark.parametrize("kind", ["kfac", "ekfac"])
ignore_padding = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@ignore_padding
@every_net
@pytest.mark.parametrize("kind", ["diagonal", "dense", "kfac"])
@pytest.mark.parametrize("fisher", FISHER_TYPES)
def test_blocks_match_the_oracle(net, kind, fisher):
    extracted = _extract(_net(net), _data(NETS[net][1]), kind, fisher=fisher, **MC)
    assert extracted.num_samples == extracted.population == SAMPLES
    assert _relative_error(extracted, _reference_blocks(net, kind, fisher)) < 1e-8
    assert extracted.discarded <= 1e-15


@ignore_padding
@every_net
@pytest.mark.parametrize("fisher", FISHER_TYPES)
def test_ekfac_is_the_nearest_in_the_basis_of_kfac(net, fisher):
    model, data = _net(net), _data(NETS[net][1])
    found = extract_curvatures(
        model, DataLoader(data, batch_size=BATCH), ("kfac", "ekfac"), fisher=fisher, **MC
    )
    dense = _reference_blocks(net, "dense", fisher)
    factored = _reference_modules(net, model)
    for layer in found["ekfac"].layers:
        block, kfac = (found[kind].blocks[layer.name] for kind in ("ekfac", "kfac"))
        matrix = dense[layer.name]["matrix"]
        largest = float(matrix.abs().max())
        if layer.name not in factored and not layer.name.endswith(ATTENTION):
            assert block.kind == kfac.kind == "diagonal"
            continue
        rows = torch.eye(layer.shape[0], dtype=torch.float64)
        if block.kind in ("ekfac", "transposed_ekfac"):
            rows = block.row_basis
            turned = rows.T @ kfac.row_factor @ rows
            assert (turned - torch.diag(turned.diagonal())).abs().max() < 1e-12
        else:
            assert block.kind == "embedding_ekfac"
        turned = block.column_basis.T @ kfac.column_factor @ block.column_basis
        assert (turned - torch.diag(turned.diagonal())).abs().max() < 1e-12
        basis = torch.kron(rows.contiguous(), block.column_basis.contiguous())
        torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis)).double())
        expected = (basis.T @ matrix @ basis).diagonal().view(layer.shape)
        assert (block.spectrum - expected).abs().max() < 1e-10 * largest
        distance, kfacs = (torch.linalg.norm(b.dense() - matrix) for b in (block, kfac))
        assert distance <= kfacs + 1e-12 * largest


@pytest.mark.parametrize("kind", EXTRACTED)
@pytest.mark.parametrize("fisher", FISHER_TYPES)
def test_float32_agrees_with_float64(kind, fisher):
    model = _net("functional").float()
    extracted = _extract(model, _data(IMAGE), kind, fisher=fisher, **MC)
    assert extracted.blocks["head"].diagonal().dtype == torch.float32
    expected = _extract(_net("functional"), _data(IMAGE), kind, fisher=fisher, **MC)
    assert expected.blocks["head"].diagonal().dtype == torch.float64
    assert _same(extracted, expected, 1e-4)


@kronecker_kinds
@pytest.mark.parametrize("net", ["attention", "attention positions first"])
def test_attention_is_the_linear_maps_it_is_made_of(net, kind):
    def forward(net, x):
        q, k, v = net.qkv(torch.tanh(net.embed(x))).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        seen = torch.softmax(q @ k.mT / 2**0.5, dim=-1) @ v
        return net.head(net.out(seen.transpose(1, 2).flatten(2)).mean(1))

    model = _net(net)
    open_model = _Net(
        forward,
        embed=model.embed,
        qkv=nn.Linear(4, 12),
        out=model.attend.out_proj,
        head=model.head,
    ).double()
    open_model.qkv.weight.data = model.attend.in_proj_weight.data
    open_model.qkv.bias.data = model.attend.in_proj_bias.data
    data = _data(SEQUENCE)
    torch.testing.assert_close(model.eval()(data.tensors[0]), open_model(data.tensors[0]))
    found, expected = (_extract(net, data, kind).blocks for net in (model, open_model))
    names = {"attend.in_proj_weight": "qkv", "attend.out_proj": "out"}
    for one, two in (names | {"embed": "embed", "head": "head"}).items():
        assert found[one].kind == expected[two].kind == {"kfac": "kronecker"}.get(kind, kind)
        torch.testing.assert_close(found[one].dense(), expected[two].dense(), rtol=0, atol=1e-12)


def test_a_subclass_that_ends_in_a_known_function_is_seen():
    extracted = _extract(_net("scaled"), _data(VECTOR))
    assert [report.backend for report in extracted.layer_reports] == ["hooks", "hooks"]
    assert "kronecker (hooks): 2 layers, 43 weights: 0, 2" in extracted.report


def test_the_report_says_how_each_layer_was_treated_and_why():
    extracted = _extract(_net("normed and grouped"), _data(IMAGE))
    treated = {t.layer.name: (t.kind, t.backend, t.reason) for t in extracted.layer_reports}
    assert treated["head"] == ("kronecker", "hooks", "")
    assert treated["second"][:2] == treated["norm"][:2] == ("diagonal", "hooks")
    assert "grouped convolution" in treated["second"][2]
    assert "scale or shift" in treated["norm"][2]
    for words in ("kronecker (hooks)", "a grouped convolution has no", "norm", "head"):
        assert words in extracted.report
    unknown = _extract(_net("recurrent"), _data(SEQUENCE))
    assert {t.layer.name: t.backend for t in unknown.layer_reports} == {
        "cell.weight_ih_l0": "torch.func",
        "cell.weight_hh_l0": "torch.func",
        "head": "hooks",
    }
    whole = _extract(_net("lenet"), _data(IMAGE), "diagonal")
    assert {t.backend for t in whole.layer_reports} == {"backpack"}
    other = _extract(_net("circular"), _data(IMAGE), "diagonal")
    assert {t.backend for t in other.layer_reports} == {"hooks"}
    assert "not by BackPACK, as 0 has padding_mode='circular'" in other.report
    assert len(_extract(_net("lenet"), _data(IMAGE), "identity").layer_reports) == 3


# ---------------------------------------------------------------------------------------------
# Where the blocks are known in closed form
# ---------------------------------------------------------------------------------------------


def _mlp(*sizes, activation=nn.Tanh, bias=True):
    torch.manual_seed(0)
    layers = [
        layer
        for rows, columns in itertools.pairwise(sizes)
        for layer in (nn.Linear(rows, columns, bias=bias), activation())
    ]
    return nn.Sequential(*layers[:-1]).double()


def _error(kind, model, data, **options):
    """How far a kind of block is from the dense block of the same Fisher."""
    options = {"tolerance": 0.0} | options
    dense = _extract(model, data, "dense", **options)
    found = _extract(model, data, kind, **options)
    expected = {name: {"matrix": block.matrix} for name, block in dense.blocks.items()}
    written = {name: Dense(block.dense(), block.shape) for name, block in found.blocks.items()}
    return _relative_error(_Blocks(written), expected)


class _Blocks:
    def __init__(self, blocks):
        self.blocks = blocks


@kronecker_kinds
@pytest.mark.parametrize("fisher", FISHER_TYPES)
def test_kfac_is_exact_for_one_sample_without_weight_sharing(kind, fisher):
    assert _error(kind, _mlp(4, 6, 5, CLASSES), _data((4,), 1), fisher=fisher, **MC) < 1e-12


@kronecker_kinds
@pytest.mark.parametrize("bias", [True, False])
def test_kfac_is_exact_for_deep_linear_nets_of_two_classes(kind, bias):
    # With two classes a unit residual is +-(1, -1) / sqrt(2): one Fisher in logit space for all.
    model = _mlp(4, 6, 5, 2, activation=nn.Identity, bias=bias)
    x, y = _data((4,), 9).tensors
    data = TensorDataset(x, y % 2)
    assert _error(kind, model, data, fisher="normalised") < 1e-12
    assert _error(kind, model, data, fisher="empirical") > 1e-3


def test_kfac_is_exact_for_a_linear_layer_that_knows_nothing():
    # Uniform probabilities: F = mean(a a') with (1 / C)(I - 1 1' / C) in front.
    linear = nn.Linear(4, CLASSES).double()
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    data = _data((4,), 9)
    assert _error("kfac", linear, data, fisher="exact") < 1e-12
    block = _extract(linear, data, fisher="exact", tolerance=0.0).blocks["weight"]
    centred = torch.eye(CLASSES, dtype=torch.float64) / CLASSES - 1 / CLASSES**2
    a = torch.cat([data.tensors[0], torch.ones(9, 1, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(block.row_factor, centred, rtol=0, atol=1e-15)
    torch.testing.assert_close(block.column_factor, a.T @ a / 9, rtol=0, atol=1e-15)


def test_kfac_is_exact_where_all_inputs_are_equal():
    x, y = _data((4,), 9).tensors
    model, data = nn.Linear(4, CLASSES).double(), TensorDataset(x[:1].expand(9, 4), y)
    assert _error("kfac", model, data, fisher="empirical") < 1e-12


@pytest.mark.parametrize("net", ["lenet", "functional", "same", "positions"])
def test_factors_have_the_traces_of_their_definition(net):
    # A bias sees a constant 1, and the normalised residual of the logits has length 1.
    extracted = _extract(_net(net), _data(NETS[net][1]), fisher="normalised")
    for layer in extracted.layers:
        if len(layer.parameters) == 2:
            corner = extracted.blocks[layer.name].column_factor[-1, -1]
            assert float(corner) == pytest.approx(1, abs=1e-12)
    last = extracted.blocks[extracted.layers[-1].name]
    assert float(last.row_factor.trace()) == pytest.approx(1, abs=1e-12)


# ---------------------------------------------------------------------------------------------
# Which samples: batches, order, workers, subsets, processes
# ---------------------------------------------------------------------------------------------


class _Recording(TensorDataset):
    """Remembers which samples were read."""

    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.read = []

    def __getitem__(self, index):
        self.read.append(int(index))
        return super().__getitem__(index)


def _many(samples=21):
    return _Recording(*_data(IMAGE, samples).tensors)


@pytest.mark.parametrize("kind", EXTRACTED)
@pytest.mark.parametrize("fisher", FISHER_TYPES)
def test_batches_do_not_matter(kind, fisher):
    model, data = _net("lenet"), _data(IMAGE, 21)
    expected = _extract(model, data, kind, fisher=fisher, batch_size=21, **MC)
    for batch_size in (1, 4, 50):
        found = _extract(model, data, kind, fisher=fisher, batch_size=batch_size, **MC)
        assert found.num_samples == 21
        assert _same(found, expected, 1e-12)


def test_mc_draws_depend_on_the_seed_and_their_number():
    model, data = _net("lenet"), _data(IMAGE)
    options = {"fisher": "mc", "draws": 2}
    expected = _extract(model, data, seed=0, **options)
    assert _same(_extract(model, data, seed=0, **options), expected)
    assert not _same(_extract(model, data, seed=1, **options), expected, 1e-3)
    assert not _same(_extract(model, data, seed=0, fisher="mc", draws=3), expected, 1e-3)


def test_mc_approaches_exact():
    model, data = _net("lenet"), _data(IMAGE, 3)
    exact = _extract(model, data, "diagonal", fisher="exact", tolerance=0.0)
    few, many = (_extract(model, data, "diagonal", fisher="mc", draws=n, seed=1) for n in (2, 400))
    assert _same(many, exact, 0.2)
    assert not _same(few, exact, 0.2)


@pytest.mark.parametrize("kind", EXTRACTED)
def test_order_does_not_matter(kind):
    model, data = _net("lenet"), _data(IMAGE, 21)
    expected = _extract(model, data, kind)
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, drop_last=True)
    assert _same(_extract(model, loader, kind), expected)
    reverse = TensorDataset(*(tensor.flip(0) for tensor in data.tensors))
    assert _same(_extract(model, reverse, kind), expected, 1e-12)


def test_workers_do_not_matter():
    model, data = _net("lenet"), _data(IMAGE, 21)
    loaders = [
        DataLoader(data, batch_size=BATCH, shuffle=True, num_workers=workers) for workers in (0, 2)
    ]
    one, two = (_extract(model, loader, fisher="mc") for loader in loaders)
    assert _same(one, two)


def test_every_call_gives_the_same_numbers():
    model, data = _net("functional"), _data(IMAGE)
    for kind in EXTRACTED:
        assert _same(_extract(model, data, kind), _extract(model, data, kind))


@pytest.mark.parametrize("kind", EXTRACTED)
def test_max_samples_is_a_seeded_subset(kind):
    model, chosen, extracted = _net("lenet"), [], []
    for seed in (0, 0, 1):
        data = _many()
        extracted.append(
            _extract(model, DataLoader(data, batch_size=4), kind, max_samples=10, seed=seed)
        )
        chosen.append(sorted(set(data.read)))
        assert (extracted[-1].num_samples, extracted[-1].population) == (10, 21)
        assert len(chosen[-1]) == 10
    assert chosen[0] == chosen[1] != chosen[2]
    assert _same(extracted[0], extracted[1])
    assert not _same(extracted[0], extracted[2], 1e-3)
    subset = DataLoader(Subset(_many(), chosen[0]), batch_size=4)
    assert _same(extracted[0], _extract(model, subset, kind))


@pytest.mark.parametrize("max_samples", [21, 1000])
def test_max_samples_of_no_fewer_than_there_are_is_all(max_samples):
    model, data = _net("lenet"), _data(IMAGE, 21)
    assert _same(_extract(model, data, max_samples=max_samples), _extract(model, data))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("max_samples", [None, 10])
@pytest.mark.parametrize(
    ("kind", "fisher"),
    [
        ("kfac", "normalised"),
        ("kfac", "mc"),
        ("diagonal", "exact"),
        ("dense", "empirical"),
        ("ekfac", "normalised"),
        ("ekfac", "mc"),
    ],
)
def test_processes_do_not_matter(kind, fisher, max_samples, world_size):
    model, options = _net("lenet"), {"fisher": fisher, "max_samples": max_samples} | MC
    alone = _extract(model, DataLoader(_many(), batch_size=4), kind, **options)
    found, read = _run_processes(model, kind, world_size, options)
    assert len(read) == (max_samples or 21)
    for together in found:
        assert together.num_samples == alone.num_samples
        assert together.population == 21
        assert _same(together, alone, 1e-11)
    for name, block in found[0].blocks.items():
        for other in found[1:]:
            for field, tensor in other.blocks[name].tensors().items():
                assert torch.equal(tensor, block.tensors()[field])


def _run_processes(model, kind, world_size, options):
    """Runs all processes at once, as threads; returns what each found, and which samples."""
    barrier, passed = threading.Barrier(world_size, timeout=60), [None] * world_size
    sets = [_many() for _ in range(world_size)]
    turn = threading.Lock()  # one at a time, as processes share no state

    def meet():
        turn.release()
        try:
            barrier.wait()
        finally:
            turn.acquire()

    def run(rank):
        def total(tensor):
            passed[rank] = tensor
            meet()
            result = torch.stack(passed).sum(0)
            meet()
            return result

        loader, shard = DataLoader(sets[rank], batch_size=4), Shard(rank, world_size, total)
        with turn:
            try:
                return _extract(copy.deepcopy(model), loader, kind, shard=shard, **options)
            except BaseException:
                barrier.abort()
                raise

    with ThreadPoolExecutor(world_size) as pool:
        found = list(pool.map(run, range(world_size)))
    return found, {index for data in sets for index in data.read}


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_that_pass_twice_agree_with_one_that_passes_once(world_size, monkeypatch):
    model, options = _net("lenet"), {"fisher": "exact"} | MC
    alone = _extract(model, DataLoader(_many(), batch_size=4), "ekfac", **options)
    monkeypatch.setattr(second_moments, "_KEPT_BYTES", 0)
    for together in _run_processes(model, "ekfac", world_size, options)[0]:
        assert _same(together, alone, 1e-11)


def test_a_process_without_samples_contributes_zeros():
    model, data = _net("lenet"), _data(IMAGE, 2)
    passed = []

    def collect(tensor):
        passed.append(tensor)
        return torch.ones_like(tensor)

    extracted = _extract(model, data, shard=Shard(2, 3, collect))
    assert extracted.num_samples == 1
    assert all(tensor.abs().max() == 0 for tensor in passed)


class _Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return (self.data[i] for i in range(len(self.data)))


def _iterable(form, data):
    batches = list(DataLoader(data, batch_size=BATCH))
    return {
        "list": batches,
        "generator": iter(batches),
        "stream": DataLoader(_Stream(data), batch_size=BATCH),
    }[form]


every_form = pytest.mark.parametrize("form", ["list", "generator", "stream"])


@every_form
@pytest.mark.parametrize("fisher", ["normalised", "exact", "mc"])
@pytest.mark.parametrize("kind", EXTRACTED)
def test_iterables_of_batches(kind, fisher, form):
    model, data = _net("lenet"), _data(IMAGE, 8)
    extracted = _extract(model, _iterable(form, data), kind, fisher=fisher)
    assert (extracted.num_samples, extracted.population) == (8, None)
    # Draws cannot belong to samples that cannot be told apart.
    same = _iterable("list", data) if fisher == "mc" else data
    assert _same(extracted, _extract(model, same, kind, fisher=fisher), 1e-12)


@every_form
@pytest.mark.parametrize("kind", EXTRACTED)
def test_no_batch_of_an_iterable_is_lost_to_an_output_changed_in_place(kind, form):
    model, data = _net("inplace functional"), _data(IMAGE, 8)
    extracted = _extract(model, _iterable(form, data), kind)
    assert extracted.num_samples == 8
    assert _same(extracted, _extract(model, data, kind), 1e-12)


def test_an_iterator_has_no_second_pass(monkeypatch):
    model, data = _net("lenet"), _data(IMAGE, 8)
    expected = _extract(model, data, "ekfac")
    monkeypatch.setattr(second_moments, "_KEPT_BYTES", 0)
    for form in ("list", "stream"):
        assert _same(_extract(model, _iterable(form, data), "ekfac"), expected, 1e-12)
    with pytest.raises(ValueError, match="two passes"):
        _extract(model, _iterable("generator", data), "ekfac")


@ignore_padding
@pytest.mark.parametrize("net", ["lenet", "positions", "embedding", "transposed", "called twice"])
@pytest.mark.parametrize("fisher", FISHER_TYPES)
def test_ekfac_of_one_pass_is_that_of_two(net, fisher, monkeypatch):
    model, data = _net(net), _many_of(net)
    once = _extract(model, data, "ekfac", fisher=fisher, **MC)
    reads = len(data.read)
    monkeypatch.setattr(second_moments, "_KEPT_BYTES", 0)
    data.read.clear()
    twice = _extract(model, data, "ekfac", fisher=fisher, **MC)
    assert len(data.read) == reads + 21
    for name, block in once.blocks.items():
        found = twice.blocks[name].tensors()
        for field, tensor in block.tensors().items():
            assert (found[field] - tensor).abs().max() <= 1e-12 * tensor.abs().max()


def _many_of(net):
    return _Recording(*_data(NETS[net][1], 21).tensors)


@ignore_padding
@every_net
def test_several_kinds_in_one_pass_are_each_kind_alone(net):
    model, data = _net(net), DataLoader(_data(NETS[net][1]), batch_size=BATCH)
    kinds = ("identity", "diagonal", "dense", "kfac", "ekfac")
    together = extract_curvatures(model, data, kinds, fisher="exact", progress=False, **MC)
    assert set(together) == set(kinds)
    for kind in kinds:
        alone = _extract(model, data, kind, fisher="exact", **MC)
        # Alone, a diagonal is BackPACK's where it supports the model: an independent check.
        assert _same(together[kind], alone, 1e-11)
        assert together[kind].num_samples == alone.num_samples
    assert "backpack" not in together["diagonal"].report


# ---------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------


def _hungry(most, fails=lambda: True):
    """A LeNet that has no memory for batches of more samples than some."""
    lenet = _cached_net("lenet")

    def forward(net, x):
        if len(x) > most and fails():
            raise torch.OutOfMemoryError("no memory")
        return net.body(x)

    return _Net(forward, body=copy.deepcopy(lenet))


@pytest.mark.parametrize("kind", EXTRACTED)
@pytest.mark.parametrize("fisher", FISHER_TYPES)
def test_batches_are_halved_until_they_fit(kind, fisher):
    model, data = _hungry(5), _data(IMAGE, 21)
    with pytest.warns(UserWarning, match="memory did not suffice") as caught:
        found = _extract(model, data, kind, fisher=fisher, batch_size=20, **MC)
    said = [str(w.message) for w in caught if "memory did not suffice" in str(w.message)]
    assert ["batches of 20 samples" in words for words in said] == [True, False]
    assert "in batches of 5" in said[1]
    assert found.num_samples == 21
    assert _same(found, _extract(_hungry(99), data, kind, fisher=fisher, batch_size=5, **MC))


@pytest.mark.parametrize("passes", [1, 2])
def test_memory_may_run_out_at_any_time(passes, monkeypatch):
    if passes == 2:
        monkeypatch.setattr(second_moments, "_KEPT_BYTES", 0)
    data = _data(IMAGE, 21)
    expected = _extract(_hungry(99), data, "ekfac", fisher="mc", **MC)
    counted = itertools.count()
    _extract(_hungry(0, lambda: next(counted) < 0), data, "ekfac", fisher="mc", batch_size=6, **MC)
    for when in range(1, next(counted)):
        calls = itertools.count()
        model = _hungry(0, lambda calls=calls, when=when: next(calls) == when)
        with pytest.warns(UserWarning, match="batches of 6 samples"):
            found = _extract(model, data, "ekfac", fisher="mc", batch_size=6, **MC)
        assert found.num_samples == 21
        assert found.discarded <= 1e-15
        assert _same(found, expected, 1e-12)


def test_a_batch_of_one_that_does_not_fit_is_an_error():
    with (
        pytest.warns(UserWarning, match="in batches of 1$"),
        pytest.raises(torch.OutOfMemoryError, match="no memory"),
    ):
        _extract(_hungry(0), _data(IMAGE), batch_size=2)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        _extract(_hungry(0), list(DataLoader(_data(IMAGE), batch_size=4)))


def test_other_errors_are_not_tried_again():
    def forward(net, x):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        _extract(_Net(forward, head=nn.Linear(2, 2)), _data(IMAGE))


def test_max_samples_of_an_iterable_is_its_first_batches():
    model, batches = _net("lenet"), list(DataLoader(_data(IMAGE, 9), batch_size=BATCH))
    extracted = _extract(model, batches, max_samples=4)
    assert extracted.num_samples == 6
    assert _same(extracted, _extract(model, batches[:2]))


def test_a_subset_sampler_is_honoured():
    model, data = _net("lenet"), _many()
    loader = DataLoader(data, batch_size=4, sampler=SubsetRandomSampler([11, 3, 5, 18]))
    extracted = _extract(model, loader)
    assert set(data.read) == {3, 5, 11, 18}
    assert extracted.num_samples == extracted.population == 4
    assert _same(extracted, _extract(model, DataLoader(Subset(data, [3, 5, 11, 18]))), 1e-12)


def test_identity_needs_no_pass():
    class Unreadable(TensorDataset):
        def __getitem__(self, index):
            raise AssertionError("identity curvature read a sample")

    extracted = _extract(_net("lenet"), Unreadable(torch.zeros(5, 1)), "identity")
    assert extracted.discarded == 0
    assert {name: block.kind for name, block in extracted.blocks.items()} == dict.fromkeys(
        ("0", "4", "6"), "identity"
    )
    assert (extracted.num_samples, extracted.population) == (0, 5)
    assert all(extracted.blocks[layer.name].shape == layer.shape for layer in extracted.layers)


def test_the_layers_cover_every_parameter():
    model = _net("normed and grouped")
    extracted = _extract(model, _data(IMAGE), "diagonal")
    assert sorted(extracted.parameter_names) == sorted(dict(model.named_parameters()))
    assert set(extracted.blocks) == {layer.name for layer in extracted.layers}
    assert extracted.seconds > 0


def test_forward_maps_batches_of_any_form():
    model, data = _net("lenet"), _data(IMAGE)
    expected = _extract(model, data)
    x, y = data.tensors
    for key in ("label", "labels", "target", "targets", "y"):
        batches = [{"image": x[:4], key: y[:4]}, {"image": x[4:], key: y[4:]}]
        found = _extract(model, batches, forward=lambda net, batch: net(batch["image"]))
        assert _same(found, expected, 1e-12)
    triples = [(x, "meta", y)]
    found = _extract(model, triples, forward=lambda net, batch: (net(batch[0]), batch[2]))
    assert _same(found, expected, 1e-12)
    unlabelled = [{"image": x}]
    found = _extract(
        model, unlabelled, fisher="exact", forward=lambda net, batch: net(batch["image"])
    )
    assert _same(found, _extract(model, data, fisher="exact"), 1e-12)


# ---------------------------------------------------------------------------------------------
# Promises: the user's module and the world around it are left as they were
# ---------------------------------------------------------------------------------------------

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _prepared_model():
    """A model in the middle of training: mixed modes, gradients, a hook of the user's own."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(108, 5),
        nn.Linear(5, CLASSES),
    ).train()
    model[2].eval()
    model[4].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[4].register_forward_hook(lambda module, args, output: None)
    return model


def _snapshot(model):
    """Everything about a model and the process that extraction could disturb."""
    modules = {}
    for path, module in model.named_modules():
        modules[path] = (
            module.training,
            tuple(tuple(getattr(module, hooks)) for hooks in HOOKS),
            sorted(module.__dict__),
            getattr(module, "inplace", None),
        )
    parameters = {}
    for name, p in model.named_parameters():
        grad = None if p.grad is None else (id(p.grad), p.grad.tolist())
        state = (p.requires_grad, p.dtype, p.data_ptr(), p._version, p._backward_hooks)
        parameters[name] = (id(p), p.tolist(), grad, sorted(p.__dict__), *state)
    name, keys, *rest = np.random.get_state()
    return {
        "modules": modules,
        "parameters": parameters,
        "buffers": {key: buffer.tolist() for key, buffer in model.named_buffers()},
        "torch": torch.get_rng_state().tolist(),
        "numpy": (name, keys.tolist(), *rest),
        "python": random.getstate(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "backpack": len(CTX.hook_handles),
    }


def _noisy_forward(model, batch):
    """Draws from every generator, as a careless forward pass or transform may."""
    x = batch[0] + 1e-9 * (torch.rand(()) + np.random.rand() + random.random())
    return model(x)


@pytest.mark.parametrize("kind", EXTRACTED)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_everything_is_left_as_it_was(kind, mode):
    model, data = _prepared_model(), _data(IMAGE)
    with mode():
        before = _snapshot(model)
        _extract(model, data, kind, fisher="mc", max_samples=5, forward=_noisy_forward)
        after = _snapshot(model)
    for part, value in before.items():
        assert after[part] == value, part


@pytest.mark.parametrize("kind", EXTRACTED)
def test_inference_mode_around_the_call(kind):
    model, data = _prepared_model(), _data(IMAGE)
    expected = _extract(model, data, kind)
    with torch.inference_mode():
        before = _snapshot(model)
        found = _extract(model, data, kind)
        assert _snapshot(model) == before
    assert _same(found, expected)


@pytest.mark.parametrize("kind", EXTRACTED)
def test_everything_is_left_as_it_was_after_a_failure(kind):
    def batches():
        yield from DataLoader(_data(IMAGE), batch_size=BATCH)
        raise OSError("the disk is gone")

    model = _prepared_model()
    before = _snapshot(model)
    with pytest.raises(OSError, match="the disk is gone"):
        _extract(model, batches(), kind, fisher="mc", forward=_noisy_forward)
    after = _snapshot(model)
    for part, value in before.items():
        assert after[part] == value, part


@pytest.mark.parametrize("kind", EXTRACTED)
def test_no_grad_and_autocast_around_the_call_change_no_number(kind):
    model, data = _net("inplace").float(), _data(IMAGE)
    expected = _extract(model, data, kind)
    with torch.no_grad():
        assert _same(_extract(model, data, kind), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(data.tensors[0].float()).dtype == torch.bfloat16
        assert _same(_extract(model, data, kind), expected)


@pytest.mark.parametrize("kind", EXTRACTED)
def test_the_model_is_seen_in_eval_mode(kind):
    model, data = _prepared_model(), _data(IMAGE)
    expected = _extract(copy.deepcopy(model).eval(), data, kind)
    assert _same(_extract(model.train(), data, kind), expected)


@pytest.mark.parametrize("kind", EXTRACTED)
def test_training_goes_on_as_if_nothing_had_happened(kind):
    model = _prepared_model()
    twin = copy.deepcopy(model)
    _extract(model, _data(IMAGE), kind)
    x, y = _data(IMAGE).tensors
    for net in (model, twin):
        net.zero_grad()
        F.cross_entropy(net(x.float()), y).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
        assert not {"sum_grad_squared", "grad_batch"} & set(p.__dict__)


@pytest.mark.parametrize("kind", EXTRACTED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_are_extracted_in_float32(kind, dtype):
    model, data = _net("lenet").to(dtype), _data(IMAGE)
    extracted = _extract(model, data, kind)
    assert all(p.dtype == dtype for p in model.parameters())
    for block in extracted.blocks.values():
        assert all(tensor.dtype == torch.float32 for tensor in block.tensors().values())
    assert _same(extracted, _extract(copy.deepcopy(model).float(), data, kind))


@pytest.mark.parametrize("kind", EXTRACTED)
def test_blocks_hold_no_graph(kind):
    extracted = _extract(_net("lenet"), _data(IMAGE), kind)
    for block in extracted.blocks.values():
        assert not any(tensor.requires_grad for tensor in block.tensors().values())


# ---------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------


def _vectors():
    return _data((4,))


every_extracted_kind = pytest.mark.parametrize("kind", EXTRACTED)


def test_unknown_options_are_named_in_one_message():
    with pytest.raises(ValueError, match="curvature='hessian'") as caught:
        _extract(nn.Linear(4, 3), _vectors(), "hessian", fisher="fish", likelihood="poisson")
    for words in ("fisher='fish'", "likelihood='poisson'", "ekfac", "normalised", "gaussian"):
        assert words in str(caught.value)


@pytest.mark.parametrize(("option", "value"), [("draws", 0), ("max_samples", 0)])
def test_numbers_below_one(option, value):
    with pytest.raises(ValueError, match=f"{option} must be at least 1"):
        _extract(nn.Linear(4, 3), _vectors(), **{option: value})


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, float("nan")])
def test_tolerances_that_are_no_share(tolerance):
    with pytest.raises(ValueError, match="tolerance must lie in"):
        _extract(nn.Linear(4, 3), _vectors(), tolerance=tolerance)


@every_extracted_kind
def test_a_loss_with_class_weights(kind):
    model = nn.Sequential(nn.Linear(4, 3))
    model.loss = nn.CrossEntropyLoss(weight=torch.ones(3))
    with pytest.raises(UnsupportedModelError, match="class weights"):
        _extract(model, _vectors(), kind)


@every_extracted_kind
def test_a_module_never_called(kind):
    model = _Net(lambda net, x: net.head(x), spare=nn.Linear(4, 4), head=nn.Linear(4, 3))
    with pytest.raises(UnsupportedModelError, match="spare: no gradient reaches it") as caught:
        _extract(model, _vectors(), kind)
    assert "head" not in str(caught.value)
    model.spare.requires_grad_(False)
    assert set(_extract(model, _vectors(), kind).blocks) == {"head"}


@every_extracted_kind
def test_a_module_called_in_some_batches_only(kind):
    model = _Net(
        lambda net, x: net.head(net.body(x) if len(x) == BATCH else x),
        body=nn.Linear(4, 4),
        head=nn.Linear(4, 3),
    )
    with pytest.raises(ValueError, match="different batches call different layers"):
        _extract(model, _vectors(), kind)


def _under_no_grad(net, x):
    with torch.no_grad():
        x = net.body(x)
    return net.head(x)


@every_extracted_kind
@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.head(net.body(x).detach()),
        lambda net, x: (net.body(x), net.head(x))[1],
        _under_no_grad,
    ],
    ids=["detached", "unused", "no_grad"],
)
def test_a_layer_that_no_gradient_reaches(kind, forward):
    model = _Net(forward, body=nn.Linear(4, 4), head=nn.Linear(4, 3))
    with pytest.raises(UnsupportedModelError, match="body: no gradient reaches it") as caught:
        _extract(model, _vectors(), kind)
    assert "head" not in str(caught.value)


@every_extracted_kind
def test_a_weight_used_without_its_module(kind):
    def build(forward):
        torch.manual_seed(0)
        return _Net(forward, body=nn.Linear(4, 4), head=nn.Linear(4, 3)).double()

    alone = build(lambda net, x: net.head(F.linear(x, net.body.weight, net.body.bias)))
    module = build(lambda net, x: net.head(net.body(x)))
    found, expected = (_extract(net, _vectors(), kind) for net in (alone, module))
    assert _same(found, expected, 1e-12)


@every_extracted_kind
def test_samples_that_depend_on_each_other(kind):
    def forward(net, x):
        return net.head(net.gain * (x - x.mean(0)))

    model = _Net(forward, head=nn.Linear(4, 3)).double()
    model.gain = nn.Parameter(torch.ones(4, dtype=torch.float64))
    for fisher in ("exact", "empirical"):
        with pytest.raises(UnsupportedModelError, match="depend on the other samples"):
            _extract(model, _vectors(), kind, fisher=fisher)


@every_extracted_kind
def test_inputs_of_one_branch_that_require_gradients(kind):
    def branches(requires_grad):
        return lambda net, x: net.a(x[:, :2].detach().requires_grad_(requires_grad)) + net.b(x)

    torch.manual_seed(0)
    one, two = nn.Linear(2, 3).double(), nn.Linear(4, 3).double()
    found, expected = (
        _extract(_Net(branches(requires_grad), a=one, b=two), _vectors(), kind)
        for requires_grad in (True, False)
    )
    assert _same(found, expected, 1e-12)


def _checkpointed(first):
    def forward(net, x):
        x = net.first(x) if first else x
        return net.head(checkpoint(lambda x: torch.tanh(net.body(x)), x, use_reentrant=False))

    return forward


@every_extracted_kind
def test_checkpointed_activations_behind_a_layer(kind):
    torch.manual_seed(0)
    modules = {name: nn.Linear(4, 4).double() for name in ("first", "body")}
    modules["head"] = nn.Linear(4, 3).double()
    found = _extract(_Net(_checkpointed(True), **modules), _vectors(), kind)
    plain = _Net(lambda n, x: n.head(torch.tanh(n.body(n.first(x)))), **modules)
    assert _same(found, _extract(plain, _vectors(), kind), 1e-12)


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "dense"])
def test_checkpointed_activations_from_the_input(kind):
    model = _Net(_checkpointed(False), body=nn.Linear(4, 4), head=nn.Linear(4, 3))
    with pytest.raises(UnsupportedModelError, match="switch gradient checkpointing off"):
        _extract(model.double(), _vectors(), kind)


@every_extracted_kind
def test_a_stream_that_begins_with_a_single_sample(kind):
    # Alone, a sample's place cannot be told from a table that is the same for all samples.
    model, data = _net("positions embedded"), _data(SEQUENCE)
    x, y = data.tensors
    found = _extract(model, [(x[:1], y[:1]), (x[1:], y[1:])], kind)
    assert _same(found, _extract(model, data, kind), 1e-12)


@every_extracted_kind
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_every_likelihood_and_several_observations(kind, likelihood):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Unflatten(1, (3, 2)))
    model = model.double()
    x = _vectors().tensors[0]
    y = torch.randint(0, 2, (SAMPLES, 3, 2)).double()
    if likelihood == "categorical":
        y = torch.randint(0, 3, (SAMPLES, 2))
        y[2, 1] = y[4] = -100
    options = {"likelihood": likelihood, "tolerance": 0.0}
    data = TensorDataset(x, y)
    found = _extract(model, data, kind, fisher="empirical", **options)
    expected = 0
    for n in range(SAMPLES):
        model.zero_grad()
        loss = {
            "categorical": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
            "bernoulli": lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="sum"),
            "gaussian": lambda z, y: F.mse_loss(z, y, reduction="sum") / 2,
        }[likelihood]
        loss(model(x[n : n + 1]), y[n : n + 1]).backward()
        expected = expected + model[2].weight.grad.square() / SAMPLES
    if kind in ("diagonal", "dense"):
        diagonal = found.blocks["2"].diagonal()[:, :-1]
        torch.testing.assert_close(diagonal, expected, rtol=0, atol=1e-12)
    exact = _extract(model, data, kind, fisher="exact", **options)
    for fisher in ("mc", "normalised"):
        drawn = _extract(model, data, kind, fisher=fisher, draws=100, **options)
        if fisher == "mc":
            assert _same(drawn, exact, 0.8)
        else:
            once, alone = (
                _extract(model, data, kind, fisher=fisher, draws=2, batch_size=size, **options)
                for size in (7, 1)
            )
            assert _same(once, alone, 1e-11)


@pytest.mark.parametrize("kind", ["diagonal", "kfac"])
def test_tolerance_leaves_out_what_it_says(kind):
    model, data = _net("lenet"), _data(IMAGE, 21)
    for parameter in model.parameters():
        parameter.data *= 3
    whole = _extract(model, data, kind, fisher="exact", batch_size=21, tolerance=0.0)
    assert whole.discarded <= 1e-15
    for tolerance in (1e-3, 0.1):
        less = _extract(model, data, kind, fisher="exact", batch_size=21, tolerance=tolerance)
        assert 0 < less.discarded <= tolerance
        for name, block in whole.blocks.items():
            assert (block.diagonal() - less.blocks[name].diagonal()).min() > -1e-12
    default = _extract(model, data, kind, fisher="exact")
    assert default.discarded <= 1e-5


def test_inputs_that_require_gradients():
    model, data = nn.Sequential(nn.Linear(4, 3)).double(), _vectors()
    found = _extract(model, data, forward=lambda net, batch: net(batch[0].requires_grad_()))
    assert _same(found, _extract(model, data))


@every_extracted_kind
def test_an_output_that_is_no_tensor_with_a_gradient(kind):
    for forward in (
        lambda net, x: (net.head(x), "auxiliary"),
        lambda net, x: net.head(x).detach(),
        torch.no_grad()(lambda net, x: net.head(x)),
    ):
        with pytest.raises(ValueError, match=r"output is (no|tuple, no) tensor.*pass `forward`"):
            _extract(_Net(forward, head=nn.Linear(4, 3)), _vectors(), kind)


@pytest.mark.parametrize(
    "batch",
    [torch.zeros(2, 4), (torch.zeros(2, 4),), (torch.zeros(2, 4),) * 3, {"x": torch.zeros(2, 4)}],
    ids=["tensor", "single", "triple", "mapping"],
)
def test_a_batch_that_is_no_pair(batch):
    with pytest.raises(ValueError, match=r"not a pair \(x, y\): pass `forward`"):
        _extract(nn.Linear(4, 3), [batch])


def test_labels_that_are_missing():
    with pytest.raises(ValueError, match="needs labels"):
        _extract(
            nn.Linear(4, 3),
            [{"x": torch.zeros(2, 4)}],
            forward=lambda net, batch: net(batch["x"]),
        )


@every_extracted_kind
def test_a_diverged_model(kind):
    model = nn.Linear(4, 3)
    nn.init.constant_(model.bias, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        _extract(model, _vectors(), kind)


@pytest.mark.parametrize(
    "loader",
    [lambda: DataLoader(TensorDataset(torch.zeros(0, 4))), list, lambda: iter([])],
    ids=["data set", "list", "iterator"],
)
def test_a_client_without_samples(loader):
    with pytest.raises(ValueError, match="holds no samples"):
        _extract(nn.Linear(4, 3), loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": WeightedRandomSampler([1.0] * SAMPLES, SAMPLES)}, "WeightedRandomSampler"),
        (
            {"batch_sampler": type("Mine", (BatchSampler,), {})(range(SAMPLES), 2, False)},
            "custom batch sampler",
        ),
        ({"batch_sampler": [[0, 1], [2]]}, "custom batch sampler"),
    ],
    ids=["weighted", "subclass", "list"],
)
def test_samplers_that_hide_which_samples_are_trained_on(options, message):
    with pytest.raises(ValueError, match=message):
        _extract(nn.Linear(4, 3), DataLoader(_vectors(), **options))


def test_a_plain_batch_sampler_is_read():
    data = _vectors()
    for sampler, samples in (
        (SequentialSampler(data), SAMPLES),
        (SubsetRandomSampler([1, 2, 3]), 3),
    ):
        loader = DataLoader(data, batch_sampler=BatchSampler(sampler, 2, False))
        extracted = _extract(nn.Linear(4, 3), loader)
        assert extracted.num_samples == extracted.population == samples
    weighted = WeightedRandomSampler([1.0] * SAMPLES, SAMPLES)
    loader = DataLoader(data, batch_sampler=BatchSampler(weighted, 2, False))
    with pytest.raises(ValueError, match="WeightedRandomSampler"):
        _extract(nn.Linear(4, 3), loader)


def test_an_iterable_on_two_processes():
    batches = list(DataLoader(_vectors(), batch_size=2))
    with pytest.raises(ValueError, match="cannot be partitioned over processes"):
        _extract(nn.Linear(4, 3), batches, shard=Shard(0, 2))


def test_a_model_that_cannot_be_copied_says_why():
    model = nn.Linear(4, 3)
    model.kept = model.weight * 2
    with pytest.raises(RuntimeError) as caught:
        _extract(model, _vectors())
    assert any("deep copy" in note for note in caught.value.__notes__)


# ---------------------------------------------------------------------------------------------
# What people do
# ---------------------------------------------------------------------------------------------


def test_a_reduction_in_place_counts_every_kind_once():
    kinds = ("kfac", "ekfac", "diagonal")
    model, loader = _net("normed and grouped"), DataLoader(_data(IMAGE), batch_size=BATCH)
    shard = Shard(total=lambda tensor: tensor.mul_(2))  # as two processes with the same samples
    twice = extract_curvatures(model, loader, kinds, shard=shard, progress=False)
    once = extract_curvatures(model, loader, kinds, progress=False)
    for kind in kinds:
        assert _same(twice[kind], once[kind], 1e-10)


def test_a_survey_of_a_stream_looks_at_few_samples():
    seen = []

    class Counting(nn.Linear):
        def forward(self, x):
            if torch.is_grad_enabled():
                seen.append(len(x))
            return super().forward(x)

    x = torch.randn(64, 4)
    _extract(Counting(4, 3), [(x, torch.zeros(64, dtype=torch.long))])
    assert seen == [4, 64]


def _padded(net, x):
    known = torch.ones(x.shape[:2], dtype=torch.bool)
    known[:, -1] = False
    return net.head(net.encoder(x, src_key_padding_mask=~known).mean(1) * net.scale)


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


def _packed(net, x):
    lengths = torch.full((len(x),), x.shape[1])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
    return net.head(net.cell(packed)[1][0])


AWKWARD = {
    "attention with padding before a bare parameter": lambda: _Net(
        _padded,
        encoder=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), 1
        ),
        head=nn.Linear(4, CLASSES),
        scale=nn.Parameter(torch.rand(4) + 0.5),
    ),
    "packed sequences": lambda: _Net(
        _packed, cell=nn.GRU(4, 3, batch_first=True), head=nn.Linear(3, CLASSES)
    ),
    "a function of the user's": lambda: _Net(
        lambda net, x: net.head(_Cube.apply(x.mean(1) * net.scale)),
        head=nn.Linear(4, CLASSES),
        scale=nn.Parameter(torch.rand(4) + 0.5),
    ),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_what_torch_func_does_not_know_is_run_sample_by_sample(name):
    torch.manual_seed(0)
    model = AWKWARD[name]().double().eval()
    x = torch.randn(4, 5, 4, dtype=torch.float64)
    y = torch.arange(4) % CLASSES
    found = _extract(model, TensorDataset(x, y), "diagonal", fisher="empirical")
    expected = {}
    for sample, label in zip(x, y, strict=True):
        logits = model(sample.unsqueeze(0))
        model.zero_grad()
        F.cross_entropy(logits, label.unsqueeze(0)).backward()
        for parameter, p in model.named_parameters():
            expected[parameter] = expected.get(parameter, 0) + p.grad**2 / len(x)
    for layer in found.layers:
        torch.testing.assert_close(
            found.blocks[layer.name].values, layer.join(expected), rtol=1e-9, atol=1e-15
        )


def test_sparse_embeddings_expanded_buffers_and_autocast_of_the_models_own():
    def forward(net, x):
        with torch.autocast("cpu", torch.bfloat16):
            return net.head(net.embed(x).mean(1) + net.shift.sum()).float()

    model = _Net(forward, embed=nn.Embedding(5, 4, sparse=True), head=nn.Linear(4, CLASSES))
    model.register_buffer("shift", torch.ones(1).expand(4))
    data = TensorDataset(torch.arange(12).view(4, 3) % 5, torch.arange(4) % CLASSES)
    for kind in ("kfac", "diagonal"):
        extracted = _extract(model, data, kind)
        assert all(torch.isfinite(block.trace()) for block in extracted.blocks.values())
        assert extracted.blocks["head"].diagonal().dtype == torch.float32
    assert model.embed.sparse


def test_outputs_of_several_parts_need_forward():
    model = _Net(lambda net, x: (net.head(x), x, x), head=nn.Linear(4, CLASSES))
    with pytest.raises(ValueError, match="pass `forward`"):
        _extract(model, _vectors(), forward=lambda module, batch: module(batch[0].float()))


@pytest.mark.parametrize("max_samples", ["all", 2.5, True])
def test_max_samples_of_another_kind(max_samples):
    with pytest.raises(ValueError, match="max_samples must be at least 1, None or 'auto'"):
        _extract(_net("lenet"), _data(IMAGE), max_samples=max_samples)
