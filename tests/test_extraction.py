"""Curvature against an independent oracle, and the promises extraction makes to its caller."""

import copy
import functools
import itertools
import random

import numpy as np
import pytest
import torch
from backpack.context import CTX
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F
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

from lightning_fedfisher.extraction import extract_curvature
from lightning_fedfisher.layers import UnsupportedModelError
from lightning_fedfisher.likelihood import FISHER_TYPES
from lightning_fedfisher.sampling import Shard

CLASSES, SAMPLES, BATCH = 3, 7, 3
MC = {"mc_samples": 3, "seed": 5}
EXTRACTED = ("diagonal", "dense", "kfac")

# ---------------------------------------------------------------------------------------------
# Networks: what they are made of, and the shape of one input
# ---------------------------------------------------------------------------------------------


class _Net(nn.Module):
    """Modules by name and a forward pass as a function of them and the input."""

    def __init__(self, forward, **modules):
        super().__init__()
        self._forward = forward
        for name, module in modules.items():
            self.add_module(name, module)

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


IMAGE, SEQUENCE = (2, 8, 8), (4, 5)
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
    # No Kronecker factors
    "normed and grouped": (lambda: _residual(norm=True), IMAGE),
    "conv1d": (lambda: _conv_head(nn.Conv1d(4, 3, 2, stride=2, padding=1), 9), SEQUENCE),
    "circular": (
        lambda: _conv_head(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), 128),
        IMAGE,
    ),
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
}


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


def _reference_layers(model):
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
    }


def _reference_logit_fisher(logits, labels, fisher):
    """The Fisher with respect to each sample's logits, ``(samples, classes, classes)``."""
    p = torch.softmax(logits, dim=1)
    if fisher == "exact":
        return torch.stack([torch.diag(row) - torch.outer(row, row) for row in p])
    if fisher == "mc":
        uniforms = np.random.default_rng(MC["seed"]).random((len(logits), MC["mc_samples"]))
        cumulative = p.cumsum(1).numpy()
        drawn = [[int((cumulative[i] <= u).sum()) for u in uniforms[i]] for i in range(len(logits))]
        residuals = torch.eye(CLASSES, dtype=p.dtype)[torch.tensor(drawn)] - p.unsqueeze(1)
        return torch.einsum("snc,snd->scd", residuals, residuals) / MC["mc_samples"]
    residual = torch.eye(CLASSES, dtype=p.dtype)[labels] - p
    moment = torch.einsum("sc,sd->scd", residual, residual)
    return moment / (residual**2).sum(1)[:, None, None] if fisher == "normalised" else moment


def _reference_jacobians(model, x):
    """d logits / d parameters of each layer, ``(samples, classes, out, in)``, bias last."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def logits_of(parameters, sample):
        return functional_call(model, parameters, (sample.unsqueeze(0),)).squeeze(0)

    jacobians = vmap(jacrev(logits_of), in_dims=(None, 0))(parameters, x)
    joined = {}
    for path in _reference_layers(model):
        weight = jacobians[f"{path}.weight"]
        parts = [weight.reshape(*weight.shape[:3], -1)]
        if f"{path}.bias" in jacobians:
            parts.append(jacobians[f"{path}.bias"].unsqueeze(3))
        joined[path] = torch.cat(parts, dim=3)
    return joined


def _reference_patches(module, x, output):
    """What each output position sees, by walking over the positions: ``(positions, in)``."""
    if isinstance(module, nn.Linear):
        rows, seen = x.reshape(-1, x.shape[-1]), output.reshape(-1, output.shape[-1])
    else:
        (kh, kw), (sh, sw), (dh, dw) = module.kernel_size, module.stride, module.dilation
        spans = (dh * (kh - 1), dw * (kw - 1))
        if module.padding == "same":
            before = [span // 2 for span in spans]
        else:
            before = [0, 0] if module.padding == "valid" else module.padding
        _, channels, height, width = x.shape
        padded = x.new_zeros(channels, height + 2 * spans[0] + 4, width + 2 * spans[1] + 4)
        padded[:, before[0] : before[0] + height, before[1] : before[1] + width] = x[0]
        places = list(itertools.product(*map(range, output.shape[2:])))
        rows = torch.stack(
            [
                padded[
                    :,
                    i * sh : i * sh + spans[0] + 1 : dh,
                    j * sw : j * sw + spans[1] + 1 : dw,
                ].flatten()
                for i, j in places
            ]
        )
        seen = torch.stack([output[0, :, i, j] for i, j in places])
    weight = module.weight.detach().flatten(1)
    if module.bias is not None:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        weight = torch.cat([weight, module.bias.detach().unsqueeze(1)], dim=1)
    torch.testing.assert_close(rows @ weight.T, seen, rtol=0, atol=1e-12)  # the oracle's own test
    return rows


def _reference_sides(model, sample):
    """Of one sample and each layer: its input patches, and d logits / d outputs."""
    modules = _reference_layers(model)
    names = {module: path for path, module in modules.items()}
    inputs, outputs, shifts = {}, {}, {}

    def record(module, args, output):
        # Clones, since what follows may work in place.
        inputs[names[module]] = args[0].detach().clone()
        outputs[names[module]] = output.detach().clone()

    def shift(module, args, output):
        return output + shifts[names[module]]

    def logits_of(zeros):
        shifts.update(zeros)
        return model(sample.unsqueeze(0)).squeeze(0)

    handles = [module.register_forward_hook(record) for module in modules.values()]
    model(sample.unsqueeze(0))
    for handle in handles:
        handle.remove()
    handles = [module.register_forward_hook(shift) for module in modules.values()]
    jacobians = jacrev(logits_of)({path: torch.zeros_like(o) for path, o in outputs.items()})
    for handle in handles:
        handle.remove()
    sides = {}
    for path, module in modules.items():
        patches = _reference_patches(module, inputs[path], outputs[path])
        channel = 2 if isinstance(module, nn.Conv2d) else -1
        by_position = jacobians[path].movedim(channel, 1).flatten(2)
        sides[path] = patches, by_position.detach()
    return sides


@functools.cache
def _reference_pass(net, samples=SAMPLES):
    model = _net(net).eval()
    x, _ = _data(NETS[net][1], samples).tensors
    sides = []
    if not net.startswith(("normed", "conv1d", "circular")):
        sides = [_reference_sides(model, sample) for sample in x]
    with torch.no_grad():
        logits = torch.cat([model(sample.unsqueeze(0)) for sample in x])
    return logits, _reference_jacobians(model, x), sides


def _reference_blocks(net, kind, fisher, samples=SAMPLES):
    """The tensors of each layer's block, from definitions alone."""
    logits, jacobians, sides = _reference_pass(net, samples)
    labels = _data(NETS[net][1], samples).tensors[1]
    middle = _reference_logit_fisher(logits, labels, fisher)
    blocks = {}
    for path, jacobian in jacobians.items():
        if kind == "kfac":
            a = [patches.T @ patches / len(patches) for patches, _ in (s[path] for s in sides)]
            g = [
                torch.einsum("cot,cd,dpt->op", j, m, j)
                for (_, j), m in zip((s[path] for s in sides), middle, strict=True)
            ]
            blocks[path] = {
                "output_factor": torch.stack(g).mean(0),
                "input_factor": torch.stack(a).mean(0),
            }
        else:
            flat = jacobian.flatten(2)
            dense = torch.einsum("sci,scd,sdj->ij", flat, middle, flat) / len(flat)
            diagonal = dense.diagonal().reshape(jacobian.shape[2:])
            blocks[path] = {"matrix": dense} if kind == "dense" else {"values": diagonal}
    return blocks


def _relative_error(extracted, expected):
    """The largest error of any tensor, relative to the largest entry of that tensor."""
    assert set(extracted.blocks) == set(expected)
    worst = 0.0
    for name, tensors in expected.items():
        found = extracted.blocks[name].tensors()
        assert set(found) == set(tensors)
        for field, tensor in tensors.items():
            assert found[field].shape == tensor.shape
            error = (found[field].double() - tensor).abs().max() / tensor.abs().max()
            worst = max(worst, float(error))
    return worst


def _same(one, two, tolerance=0.0):
    expected = {name: block.tensors() for name, block in two.blocks.items()}
    return _relative_error(one, expected) <= tolerance


ORACLE_CASES = [
    pytest.param(net, kind, id=f"{net}-{kind}")
    for net, kind in itertools.product(NETS, EXTRACTED)
    if not net.startswith(("inplace functional", "circular", "positions f", "same"))
    and not (kind == "kfac" and net in ("normed and grouped", "conv1d"))
] + [
    pytest.param(net, "kfac", id=f"{net}-kfac")
    for net in ("same", "same even", "inplace functional")
]

AWKWARD_CASES = [
    pytest.param(net, kind, id=f"{net}-{kind}")
    for net, kinds in (
        ("same", ("diagonal", "dense")),
        ("same even", ("diagonal", "dense")),
        ("circular", ("diagonal", "dense")),
        ("positions first", EXTRACTED),
        ("positions flattened", EXTRACTED),
        ("inplace functional", ("diagonal", "dense")),
    )
    for kind in kinds
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("fisher", FISHER_TYPES)
@pytest.mark.parametrize(("net", "kind"), ORACLE_CASES)
def test_blocks_match_the_oracle(net, kind, fisher):
    extracted = _extract(_net(net), _data(NETS[net][1]), kind, fisher=fisher, **MC)
    assert extracted.num_samples == extracted.population == SAMPLES
    assert _relative_error(extracted, _reference_blocks(net, kind, fisher)) < 1e-8


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("net", "kind"), AWKWARD_CASES)
def test_blocks_match_the_oracle_or_the_model_is_refused(net, kind):
    try:
        extracted = _extract(_net(net), _data(NETS[net][1]), kind, fisher="empirical")
    except UnsupportedModelError:
        return
    assert _relative_error(extracted, _reference_blocks(net, kind, "empirical")) < 1e-8


@pytest.mark.parametrize("kind", EXTRACTED)
@pytest.mark.parametrize("fisher", FISHER_TYPES)
def test_float32_agrees_with_float64(kind, fisher):
    model = _net("functional").float()
    extracted = _extract(model, _data(IMAGE), kind, fisher=fisher, **MC)
    assert extracted.blocks["head"].diagonal().dtype == torch.float32
    assert _relative_error(extracted, _reference_blocks("functional", kind, fisher)) < 1e-4


def test_embedding_is_refused():
    model = _Net(
        lambda net, x: net.head(net.embed(x).mean(1)),
        embed=nn.Embedding(4, 6),
        head=nn.Linear(6, CLASSES),
    )
    tokens, labels = torch.randint(0, 4, (SAMPLES, 5)), torch.arange(SAMPLES) % CLASSES
    for kind in EXTRACTED:
        with pytest.raises(UnsupportedModelError, match="Embedding"):
            _extract(model, TensorDataset(tokens, labels), kind)


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


def _kfac_error(model, data, **options):
    """How far G (x) A is from the dense block of the same Fisher."""
    dense = _extract(model, data, "dense", **options)
    kfac = _extract(model, data, "kfac", **options)
    expected = {name: {"matrix": block.matrix} for name, block in dense.blocks.items()}
    kronecker = copy.copy(dense.blocks)
    for name, block in kfac.blocks.items():
        kronecker[name] = type(dense.blocks[name])(block.dense(), block.shape)
    return _relative_error(_Blocks(kronecker), expected)


class _Blocks:
    def __init__(self, blocks):
        self.blocks = blocks


@pytest.mark.parametrize("fisher", FISHER_TYPES)
def test_kfac_is_exact_for_one_sample_without_weight_sharing(fisher):
    assert _kfac_error(_mlp(4, 6, 5, CLASSES), _data((4,), 1), fisher=fisher, **MC) < 1e-12


@pytest.mark.parametrize("bias", [True, False])
def test_kfac_is_exact_for_deep_linear_nets_of_two_classes(bias):
    # With two classes a unit residual is +-(1, -1) / sqrt(2): one Fisher in logit space for all.
    model = _mlp(4, 6, 5, 2, activation=nn.Identity, bias=bias)
    x, y = _data((4,), 9).tensors
    data = TensorDataset(x, y % 2)
    assert _kfac_error(model, data, fisher="normalised") < 1e-12
    assert _kfac_error(model, data, fisher="empirical") > 1e-3


def test_kfac_is_exact_for_a_linear_layer_that_knows_nothing():
    # Uniform probabilities: F = mean(a a') with (1 / C)(I - 1 1' / C) in front.
    linear = nn.Linear(4, CLASSES).double()
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    data = _data((4,), 9)
    assert _kfac_error(linear, data, fisher="exact") < 1e-12
    block = _extract(linear, data, fisher="exact").blocks["weight"]
    centred = torch.eye(CLASSES, dtype=torch.float64) / CLASSES - 1 / CLASSES**2
    a = torch.cat([data.tensors[0], torch.ones(9, 1, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(block.output_factor, centred, rtol=0, atol=1e-15)
    torch.testing.assert_close(block.input_factor, a.T @ a / 9, rtol=0, atol=1e-15)


def test_kfac_is_exact_where_all_inputs_are_equal():
    x, y = _data((4,), 9).tensors
    model, data = nn.Linear(4, CLASSES).double(), TensorDataset(x[:1].expand(9, 4), y)
    assert _kfac_error(model, data, fisher="empirical") < 1e-12


@pytest.mark.parametrize("net", ["lenet", "functional", "same", "positions"])
def test_factors_have_the_traces_of_their_definition(net):
    # A bias sees a constant 1, and the normalised residual of the logits has length 1.
    extracted = _extract(_net(net), _data(NETS[net][1]), fisher="normalised")
    for layer in extracted.layers:
        if len(layer.parameters) == 2:
            corner = extracted.blocks[layer.name].input_factor[-1, -1]
            assert float(corner) == pytest.approx(1, abs=1e-12)
    last = extracted.blocks[extracted.layers[-1].name]
    assert float(last.output_factor.trace()) == pytest.approx(1, abs=1e-12)


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
    options = {"fisher": "mc", "mc_samples": 2}
    expected = _extract(model, data, seed=0, **options)
    assert _same(_extract(model, data, seed=0, **options), expected)
    assert not _same(_extract(model, data, seed=1, **options), expected, 1e-3)
    assert not _same(_extract(model, data, seed=0, fisher="mc", mc_samples=3), expected, 1e-3)


def test_mc_approaches_exact():
    model, data = _net("lenet"), _data(IMAGE, 3)
    exact = _extract(model, data, "diagonal", fisher="exact")
    few, many = (
        _extract(model, data, "diagonal", fisher="mc", mc_samples=n, seed=1) for n in (2, 400)
    )
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
        chosen.append(data.read)
        assert (extracted[-1].num_samples, extracted[-1].population) == (10, 21)
        assert len(data.read) == len(set(data.read)) == 10
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
    [("kfac", "normalised"), ("kfac", "mc"), ("diagonal", "exact"), ("dense", "empirical")],
)
def test_processes_do_not_matter(kind, fisher, max_samples, world_size):
    model, options = _net("lenet"), {"fisher": fisher, "max_samples": max_samples} | MC
    alone = _extract(model, DataLoader(_many(), batch_size=4), kind, **options)
    sums, read = _run_ranks(model, kind, world_size, options)
    assert len(read) == len(set(read)) == (max_samples or 21)
    for rank in range(world_size):
        reduced = iter(sums)
        shard = Shard(rank, world_size, lambda tensor, reduced=reduced: next(reduced))
        loader = DataLoader(_many(), batch_size=4)
        together = _extract(model, loader, kind, shard=shard, **options)
        assert together.num_samples == alone.num_samples
        assert together.population == 21
        assert next(reduced, None) is None
        assert _same(together, alone, 1e-12)


def _run_ranks(model, kind, world_size, options):
    """Runs each rank by itself; returns what a sum over all would give, call by call."""
    contributions, read = [], []
    for rank in range(world_size):
        passed = []

        def collect(tensor, passed=passed):
            passed.append(tensor.clone())
            return tensor

        data = _many()
        _extract(
            model,
            DataLoader(data, batch_size=4),
            kind,
            shard=Shard(rank, world_size, collect),
            **options,
        )
        contributions.append(passed)
        read += data.read
    return [sum(tensors) for tensors in zip(*contributions, strict=True)], read


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


@pytest.mark.parametrize("fisher", ["normalised", "mc"])
@pytest.mark.parametrize("form", ["list", "generator", "stream"])
def test_iterables_of_batches(form, fisher):
    model, data = _net("lenet"), _data(IMAGE, 8)
    batches = list(DataLoader(data, batch_size=BATCH))
    iterable = {
        "list": batches,
        "generator": iter(batches),
        "stream": DataLoader(_Stream(data), batch_size=BATCH),
    }[form]
    extracted = _extract(model, iterable, fisher=fisher)
    assert (extracted.num_samples, extracted.population) == (8, None)
    assert _same(extracted, _extract(model, data, fisher=fisher))


def test_max_samples_of_an_iterable_is_its_first_batches():
    model, batches = _net("lenet"), list(DataLoader(_data(IMAGE, 9), batch_size=BATCH))
    extracted = _extract(model, batches, max_samples=4)
    assert extracted.num_samples == 6
    assert _same(extracted, _extract(model, batches[:2]))


def test_a_subset_sampler_is_honoured():
    model, data = _net("lenet"), _many()
    loader = DataLoader(data, batch_size=4, sampler=SubsetRandomSampler([11, 3, 5, 18]))
    extracted = _extract(model, loader)
    assert sorted(data.read) == [3, 5, 11, 18]
    assert extracted.num_samples == extracted.population == 4
    assert _same(extracted, _extract(model, DataLoader(Subset(data, [3, 5, 11, 18]))), 1e-12)


def test_identity_needs_no_pass():
    class Unreadable(TensorDataset):
        def __getitem__(self, index):
            raise AssertionError("identity curvature read a sample")

    extracted = _extract(_net("lenet"), Unreadable(torch.zeros(5, 1)), "identity")
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
        _extract(nn.Linear(4, 3), _vectors(), "hessian", fisher="fish", likelihood="gaussian")
    for words in ("fisher='fish'", "likelihood='gaussian'", "kfac", "normalised", "categorical"):
        assert words in str(caught.value)


@pytest.mark.parametrize(("option", "value"), [("mc_samples", 0), ("max_samples", 0)])
def test_numbers_below_one(option, value):
    with pytest.raises(ValueError, match=f"{option} must be at least 1"):
        _extract(nn.Linear(4, 3), _vectors(), **{option: value})


def test_layers_without_kronecker_factors_are_all_named():
    model = nn.ModuleDict(
        {
            "good": nn.Linear(4, 4),
            "norm": nn.LayerNorm(4),
            "grouped": nn.Conv2d(4, 4, 3, groups=2),
            "circular": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
            "attention": nn.MultiheadAttention(4, 2),
        }
    )
    with pytest.raises(UnsupportedModelError) as caught:
        _extract(model, _vectors(), "kfac")
    assert len(caught.value.offenders) == 5
    for words in (
        "norm.weight, norm.bias of LayerNorm",
        "grouped.weight, grouped.bias of Conv2d",
        "circular.weight, circular.bias of Conv2d",
        "attention.in_proj_weight of MultiheadAttention",
        "attention.in_proj_bias of MultiheadAttention",
    ):
        assert words in str(caught.value)
    assert "good" not in str(caught.value)


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
def test_layers_without_per_sample_gradients_are_all_named(kind):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.PReLU())
    with pytest.raises(UnsupportedModelError, match=r"(?s)1\.weight, 1\.bias of LayerNorm.*2\.wei"):
        _extract(model, _vectors(), kind)


@every_extracted_kind
def test_a_module_called_twice(kind):
    model = _Net(lambda net, x: net.head(net.body(net.body(x))), body=nn.Linear(4, 4))
    model.head = nn.Linear(4, 3)
    with pytest.raises(UnsupportedModelError, match="body ran 2 times") as caught:
        _extract(model, _vectors(), kind)
    assert "head" not in str(caught.value)


@every_extracted_kind
def test_a_module_never_called(kind):
    model = _Net(lambda net, x: net.head(x), spare=nn.Linear(4, 4), head=nn.Linear(4, 3))
    with pytest.raises(UnsupportedModelError, match="spare ran 0 times"):
        _extract(model, _vectors(), kind)


@every_extracted_kind
def test_a_module_called_in_some_batches_only(kind):
    model = _Net(
        lambda net, x: net.head(net.body(x) if len(x) == BATCH else x),
        body=nn.Linear(4, 4),
        head=nn.Linear(4, 3),
    )
    with pytest.raises(UnsupportedModelError, match="body ran 0 times"):
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
    with pytest.raises(UnsupportedModelError, match="body") as caught:
        _extract(model, _vectors(), kind)
    assert "head" not in str(caught.value)


@every_extracted_kind
def test_a_weight_used_without_its_module(kind):
    model = _Net(
        lambda net, x: net.head(F.linear(x, net.body.weight, net.body.bias)),
        body=nn.Linear(4, 4),
        head=nn.Linear(4, 3),
    )
    with pytest.raises(UnsupportedModelError, match="body ran 0 times"):
        _extract(model, _vectors(), kind)


@every_extracted_kind
def test_a_weight_used_by_its_module_and_without_it(kind):
    model = _Net(
        lambda net, x: net.head(F.linear(torch.tanh(net.body(x)), net.body.weight.T)),
        body=nn.Linear(4, 4),
        head=nn.Linear(4, 3),
    )
    with pytest.raises(UnsupportedModelError, match="body"):
        _extract(model, _vectors(), kind)


class _Standardised(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight / self.weight.norm(), self.bias)


@every_extracted_kind
def test_a_subclass_with_a_forward_of_its_own(kind):
    with pytest.raises(UnsupportedModelError, match="_Standardised"):
        _extract(nn.Sequential(_Standardised(4, 3)), _vectors(), kind)


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
        with pytest.raises(ValueError, match="no tensor with a gradient"):
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
    with pytest.raises(ValueError, match="cannot be dealt to several processes"):
        _extract(nn.Linear(4, 3), batches, shard=Shard(0, 2))


def test_a_model_that_cannot_be_copied_says_why():
    model = nn.Linear(4, 3)
    model.kept = model.weight * 2
    with pytest.raises(RuntimeError) as caught:
        _extract(model, _vectors())
    assert any("deep copy" in note for note in caught.value.__notes__)
