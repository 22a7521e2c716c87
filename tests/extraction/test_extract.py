"""Curvature against an independent oracle, and where it is known in closed form."""

import itertools

import pytest
import torch
from helpers.networks import (
    BATCH,
    CLASSES,
    EXTRACTED,
    IMAGE,
    MC,
    NETS,
    OPENED,
    SAMPLES,
    SEQUENCE,
    VECTOR,
    Net,
    build_net,
    every_extracted_kind,
    every_net,
    extract,
    ignore_padding,
    make_data,
)
from oracles.curvature import are_equal, reference_blocks, reference_modules, relative_error
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher.curvature.dense import Dense
from lightning_fedfisher.extraction.extract import extract_curvatures
from lightning_fedfisher.extraction.fisher_types import FISHER_TYPES

kronecker_kinds = pytest.mark.parametrize("kind", ["kfac", "ekfac"])


@ignore_padding
@every_net
@pytest.mark.parametrize("kind", ["diagonal", "dense", "kfac"])
@pytest.mark.parametrize("fisher", FISHER_TYPES)
def test_blocks_match_the_oracle(net, kind, fisher):
    extracted = extract(build_net(net), make_data(NETS[net][1]), kind, fisher=fisher, **MC)
    assert extracted.num_samples == extracted.population == SAMPLES
    assert relative_error(extracted, reference_blocks(net, kind, fisher)) < 1e-8
    assert extracted.discarded <= 1e-15


@ignore_padding
@every_net
@pytest.mark.parametrize("fisher", FISHER_TYPES)
def test_ekfac_is_the_nearest_in_the_basis_of_kfac(net, fisher):
    model, data = build_net(net), make_data(NETS[net][1])
    found = extract_curvatures(
        model, DataLoader(data, batch_size=BATCH), ("kfac", "ekfac"), fisher=fisher, **MC
    )
    dense = reference_blocks(net, "dense", fisher)
    factored = reference_modules(net, model)
    for layer in found["ekfac"].layers:
        block, kfac = (found[kind].blocks[layer.name] for kind in ("ekfac", "kfac"))
        matrix = dense[layer.name]["matrix"]
        largest = float(matrix.abs().max())
        if layer.name not in factored and not layer.name.endswith(OPENED):
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
    model = build_net("functional").float()
    extracted = extract(model, make_data(IMAGE), kind, fisher=fisher, **MC)
    assert extracted.blocks["head"].diagonal().dtype == torch.float32
    expected = extract(build_net("functional"), make_data(IMAGE), kind, fisher=fisher, **MC)
    assert expected.blocks["head"].diagonal().dtype == torch.float64
    assert are_equal(extracted, expected, 1e-4)


@kronecker_kinds
@pytest.mark.parametrize("net", ["attention", "attention positions first"])
def test_attention_is_the_linear_maps_it_is_made_of(net, kind):
    def forward(net, x):
        q, k, v = net.qkv(torch.tanh(net.embed(x))).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        seen = torch.softmax(q @ k.mT / 2**0.5, dim=-1) @ v
        return net.head(net.out(seen.transpose(1, 2).flatten(2)).mean(1))

    model = build_net(net)
    open_model = Net(
        forward,
        embed=model.embed,
        qkv=nn.Linear(4, 12),
        out=model.attend.out_proj,
        head=model.head,
    ).double()
    open_model.qkv.weight.data = model.attend.in_proj_weight.data
    open_model.qkv.bias.data = model.attend.in_proj_bias.data
    data = make_data(SEQUENCE)
    torch.testing.assert_close(model.eval()(data.tensors[0]), open_model(data.tensors[0]))
    found, expected = (extract(net, data, kind).blocks for net in (model, open_model))
    names = {"attend.in_proj_weight": "qkv", "attend.out_proj": "out"}
    for one, two in (names | {"embed": "embed", "head": "head"}).items():
        assert found[one].kind == expected[two].kind == {"kfac": "kronecker"}.get(kind, kind)
        torch.testing.assert_close(found[one].dense(), expected[two].dense(), rtol=0, atol=1e-12)


def test_a_subclass_that_ends_in_a_known_function_is_seen():
    extracted = extract(build_net("scaled"), make_data(VECTOR))
    assert [report.backend for report in extracted.layer_reports] == ["hooks", "hooks"]
    assert "kronecker (hooks): 2 layers, 43 weights: 0, 2" in extracted.report


def test_the_report_says_how_each_layer_was_treated_and_why():
    extracted = extract(build_net("normed and grouped"), make_data(IMAGE))
    treated = {t.layer.name: (t.kind, t.backend, t.reason) for t in extracted.layer_reports}
    assert treated["head"] == ("kronecker", "hooks", "")
    assert treated["second"][:2] == treated["norm"][:2] == ("diagonal", "hooks")
    assert "grouped convolution" in treated["second"][2]
    assert "scale or shift" in treated["norm"][2]
    for words in ("kronecker (hooks)", "a grouped convolution has no", "norm", "head"):
        assert words in extracted.report
    opened = extract(build_net("recurrent"), make_data(SEQUENCE))
    assert {(t.kind, t.backend) for t in opened.layer_reports} == {("kronecker", "hooks")}
    unknown = extract(build_net("bare"), make_data(VECTOR))
    backends = {t.layer.name: t.backend for t in unknown.layer_reports}
    assert backends["first"] == backends["second"] == "torch.func"
    whole = extract(build_net("lenet"), make_data(IMAGE), "diagonal")
    assert {t.backend for t in whole.layer_reports} == {"backpack"}
    other = extract(build_net("circular"), make_data(IMAGE), "diagonal")
    assert {t.backend for t in other.layer_reports} == {"hooks"}
    assert "not by BackPACK, as 0 has padding_mode='circular'" in other.report
    assert len(extract(build_net("lenet"), make_data(IMAGE), "identity").layer_reports) == 3


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
    dense = extract(model, data, "dense", **options)
    found = extract(model, data, kind, **options)
    expected = {name: {"matrix": block.matrix} for name, block in dense.blocks.items()}
    written = {name: Dense(block.dense(), block.shape) for name, block in found.blocks.items()}
    return relative_error(_Blocks(written), expected)


class _Blocks:
    def __init__(self, blocks):
        self.blocks = blocks


@kronecker_kinds
@pytest.mark.parametrize("fisher", FISHER_TYPES)
def test_kfac_is_exact_for_one_sample_without_weight_sharing(kind, fisher):
    assert _error(kind, _mlp(4, 6, 5, CLASSES), make_data((4,), 1), fisher=fisher, **MC) < 1e-12


@kronecker_kinds
@pytest.mark.parametrize("bias", [True, False])
def test_kfac_is_exact_for_deep_linear_nets_of_two_classes(kind, bias):
    # With two classes a unit residual is +-(1, -1) / sqrt(2): one Fisher in logit space for all.
    model = _mlp(4, 6, 5, 2, activation=nn.Identity, bias=bias)
    x, y = make_data((4,), 9).tensors
    data = TensorDataset(x, y % 2)
    assert _error(kind, model, data, fisher="normalised") < 1e-12
    assert _error(kind, model, data, fisher="empirical") > 1e-3


def test_kfac_is_exact_for_a_linear_layer_that_knows_nothing():
    # Uniform probabilities: F = mean(a a') with (1 / C)(I - 1 1' / C) in front.
    linear = nn.Linear(4, CLASSES).double()
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    data = make_data((4,), 9)
    assert _error("kfac", linear, data, fisher="exact") < 1e-12
    block = extract(linear, data, fisher="exact", tolerance=0.0).blocks["weight"]
    centred = torch.eye(CLASSES, dtype=torch.float64) / CLASSES - 1 / CLASSES**2
    a = torch.cat([data.tensors[0], torch.ones(9, 1, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(block.row_factor, centred, rtol=0, atol=1e-15)
    torch.testing.assert_close(block.column_factor, a.T @ a / 9, rtol=0, atol=1e-15)


def test_kfac_is_exact_where_all_inputs_are_equal():
    x, y = make_data((4,), 9).tensors
    model, data = nn.Linear(4, CLASSES).double(), TensorDataset(x[:1].expand(9, 4), y)
    assert _error("kfac", model, data, fisher="empirical") < 1e-12


@pytest.mark.parametrize("net", ["lenet", "functional", "same", "positions"])
def test_factors_have_the_traces_of_their_definition(net):
    # A bias sees a constant 1, and the normalised residual of the logits has length 1.
    extracted = extract(build_net(net), make_data(NETS[net][1]), fisher="normalised")
    for layer in extracted.layers:
        if len(layer.parameters) == 2:
            corner = extracted.blocks[layer.name].column_factor[-1, -1]
            assert float(corner) == pytest.approx(1, abs=1e-12)
    last = extracted.blocks[extracted.layers[-1].name]
    assert float(last.row_factor.trace()) == pytest.approx(1, abs=1e-12)


@ignore_padding
@every_net
def test_several_kinds_in_one_pass_are_each_kind_alone(net):
    model, data = build_net(net), DataLoader(make_data(NETS[net][1]), batch_size=BATCH)
    kinds = ("identity", "diagonal", "dense", "kfac", "ekfac")
    options = {"fisher": "exact", "positions": None, "progress": False, **MC}
    together = extract_curvatures(model, data, kinds, **options)
    assert set(together) == set(kinds)
    for kind in kinds:
        alone = extract(model, data, kind, **options)
        # Alone, a diagonal is BackPACK's where it supports the model: an independent check.
        assert are_equal(together[kind], alone, 1e-11)
        assert together[kind].num_samples == alone.num_samples
    assert "backpack" not in together["diagonal"].report


def test_the_layers_cover_every_parameter():
    model = build_net("normed and grouped")
    extracted = extract(model, make_data(IMAGE), "diagonal")
    assert sorted(extracted.parameter_names) == sorted(dict(model.named_parameters()))
    assert set(extracted.blocks) == {layer.name for layer in extracted.layers}
    assert extracted.seconds > 0


@every_extracted_kind
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_every_likelihood_and_several_observations(kind, likelihood):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Unflatten(1, (3, 2)))
    model = model.double()
    x = make_data(VECTOR).tensors[0]
    y = torch.randint(0, 2, (SAMPLES, 3, 2)).double()
    if likelihood == "categorical":
        y = torch.randint(0, 3, (SAMPLES, 2))
        y[2, 1] = y[4] = -100
    options = {"likelihood": likelihood, "tolerance": 0.0}
    data = TensorDataset(x, y)
    found = extract(model, data, kind, fisher="empirical", **options)
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
    exact = extract(model, data, kind, fisher="exact", **options)
    drawn = extract(model, data, kind, fisher="mc", draws=100, **options)
    assert are_equal(drawn, exact, 0.8)
    once, alone = (
        extract(model, data, kind, fisher="normalised", draws=2, batch_size=size, **options)
        for size in (7, 1)
    )
    assert are_equal(once, alone, 1e-11)


@pytest.mark.parametrize("kind", ["diagonal", "kfac"])
def test_tolerance_leaves_out_what_it_says(kind):
    model, data = build_net("lenet"), make_data(IMAGE, 21)
    for parameter in model.parameters():
        parameter.data *= 3
    whole = extract(model, data, kind, fisher="exact", batch_size=21, tolerance=0.0)
    assert whole.discarded <= 1e-15
    for tolerance in (1e-3, 0.1):
        less = extract(model, data, kind, fisher="exact", batch_size=21, tolerance=tolerance)
        assert 0 < less.discarded <= tolerance
        for name, block in whole.blocks.items():
            assert (block.diagonal() - less.blocks[name].diagonal()).min() > -1e-12
    default = extract(model, data, kind, fisher="exact")
    assert default.discarded <= 1e-5
