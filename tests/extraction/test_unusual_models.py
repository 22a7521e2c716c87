"""Models whose forward pass is unusual: their curvature is right all the same."""

import pytest
import torch
from helpers.networks import (
    CLASSES,
    IMAGE,
    VECTOR,
    Net,
    build_net,
    every_extracted_kind,
    extract,
    make_data,
)
from oracles.curvature import are_equal
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset


def test_forward_maps_batches_of_any_form():
    model, data = build_net("lenet"), make_data(IMAGE)
    expected = extract(model, data)
    x, y = data.tensors
    batches = [{"image": x[:4], "label": y[:4]}, {"image": x[4:], "label": y[4:]}]
    labelled = lambda net, batch: (net(batch["image"]), batch["label"])  # noqa: E731
    assert are_equal(extract(model, batches, forward=labelled), expected, 1e-12)
    # What is not returned is not guessed.
    with pytest.raises(ValueError, match="needs labels"):
        extract(model, batches, forward=lambda net, batch: net(batch["image"]))
    triples = [(x, "meta", y)]
    found = extract(model, triples, forward=lambda net, batch: (net(batch[0]), batch[2]))
    assert are_equal(found, expected, 1e-12)
    unlabelled = [{"image": x}]
    found = extract(
        model, unlabelled, fisher="exact", forward=lambda net, batch: net(batch["image"])
    )
    assert are_equal(found, extract(model, data, fisher="exact"), 1e-12)


@every_extracted_kind
def test_a_weight_used_without_its_module(kind):
    def build(forward):
        torch.manual_seed(0)
        return Net(forward, body=nn.Linear(4, 4), head=nn.Linear(4, 3)).double()

    alone = build(lambda net, x: net.head(F.linear(x, net.body.weight, net.body.bias)))
    module = build(lambda net, x: net.head(net.body(x)))
    found, expected = (extract(net, make_data(VECTOR), kind) for net in (alone, module))
    assert are_equal(found, expected, 1e-12)


@every_extracted_kind
def test_inputs_of_one_branch_that_require_gradients(kind):
    def branches(requires_grad):
        return lambda net, x: net.a(x[:, :2].detach().requires_grad_(requires_grad)) + net.b(x)

    torch.manual_seed(0)
    one, two = nn.Linear(2, 3).double(), nn.Linear(4, 3).double()
    found, expected = (
        extract(Net(branches(requires_grad), a=one, b=two), make_data(VECTOR), kind)
        for requires_grad in (True, False)
    )
    assert are_equal(found, expected, 1e-12)


def _checkpointed(net, x):
    x = net.first(x)
    return net.head(checkpoint(lambda x: torch.tanh(net.body(x)), x, use_reentrant=False))


@every_extracted_kind
def test_checkpointed_activations_behind_a_layer(kind):
    torch.manual_seed(0)
    modules = {name: nn.Linear(4, 4).double() for name in ("first", "body")}
    modules["head"] = nn.Linear(4, 3).double()
    found = extract(Net(_checkpointed, **modules), make_data(VECTOR), kind)
    plain = Net(lambda n, x: n.head(torch.tanh(n.body(n.first(x)))), **modules)
    assert are_equal(found, extract(plain, make_data(VECTOR), kind), 1e-12)


def test_inputs_that_require_gradients():
    model, data = nn.Sequential(nn.Linear(4, 3)).double(), make_data(VECTOR)
    found = extract(
        model, data, forward=lambda net, batch: (net(batch[0].requires_grad_()), batch[1])
    )
    assert are_equal(found, extract(model, data))


def _scaled(x, scale):
    """A parameter in an operation that is not known."""
    return torch.einsum("nc,c->nc", x, scale)


def _padded(net, x):
    known = torch.ones(x.shape[:2], dtype=torch.bool)
    known[:, -1] = False
    return net.head(_scaled(net.encoder(x, src_key_padding_mask=~known).mean(1), net.scale))


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
    "attention with padding before a bare parameter": lambda: Net(
        _padded,
        encoder=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), 1
        ),
        head=nn.Linear(4, CLASSES),
        scale=nn.Parameter(torch.rand(4) + 0.5),
    ),
    "packed sequences": lambda: Net(
        _packed, cell=nn.GRU(4, 3, batch_first=True), head=nn.Linear(3, CLASSES)
    ),
    "a function of the user's": lambda: Net(
        lambda net, x: net.head(_Cube.apply(_scaled(x.mean(1), net.scale))),
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
    found = extract(model, TensorDataset(x, y), "diagonal", fisher="empirical")
    assert "torch.func" in {report.backend for report in found.layer_reports}
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

    model = Net(forward, embed=nn.Embedding(5, 4, sparse=True), head=nn.Linear(4, CLASSES))
    model.register_buffer("shift", torch.ones(1).expand(4))
    data = TensorDataset(torch.arange(12).view(4, 3) % 5, torch.arange(4) % CLASSES)
    for kind in ("kfac", "diagonal"):
        extracted = extract(model, data, kind)
        assert all(torch.isfinite(block.trace()) for block in extracted.blocks.values())
        assert extracted.blocks["head"].diagonal().dtype == torch.float32
    assert model.embed.sparse


class _ByCells(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.layer = nn.GRUCell(4, 3), nn.LSTM(3, 2, batch_first=True)
        self.head = nn.Linear(2, CLASSES)

    def forward(self, x):
        states = [self.cell(x[:, 0])]
        for position in x[:, 1:].unbind(1):
            states.append(self.cell(position, states[-1]))
        return self.head(self.layer(torch.stack(states, 1))[0][:, -1])


@every_extracted_kind
@pytest.mark.parametrize("lengths", [(4, 1, 6), (1, 5)])
def test_recurrent_layers_over_sequences_of_other_lengths_in_each_batch(kind, lengths):
    torch.manual_seed(0)
    model, y = _ByCells().double(), torch.arange(4) % CLASSES
    batches = [(torch.randn(4, length, 4, dtype=torch.float64), y) for length in lengths]
    found = extract(model, batches, kind)
    assert {report.backend for report in found.layer_reports} == {"hooks"}
    alone = [extract(model, [batch], kind) for batch in batches]
    for name, block in found.blocks.items():
        each = [one.blocks[name] for one in alone]
        if kind == "kfac":
            for field, tensor in block.tensors().items():
                mean = sum(other.tensors()[field] for other in each) / len(each)
                torch.testing.assert_close(tensor, mean, rtol=1e-10, atol=1e-14)
        elif kind == "ekfac":
            mean = sum(other.trace() for other in each) / len(each)
            torch.testing.assert_close(block.trace(), mean, rtol=1e-10, atol=1e-14)
        else:
            mean = sum(other.dense() for other in each) / len(each)
            torch.testing.assert_close(block.dense(), mean, rtol=1e-10, atol=1e-14)


def test_a_weight_that_is_standardised_is_no_batch():
    class Standardised(nn.Linear):
        def forward(self, x):
            weight = F.batch_norm(self.weight.unsqueeze(0), None, None, training=True)
            return F.linear(x, weight[0], self.bias)

    torch.manual_seed(0)
    model = nn.Sequential(Standardised(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = make_data(VECTOR)
    found = extract(model, data, "diagonal", fisher="exact", tolerance=0.0)
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for sample in data.tensors[0]:
        logits = model(sample.unsqueeze(0))[0]
        for p, logit in zip(logits.softmax(0).detach(), logits.log_softmax(0), strict=True):
            weight, bias = torch.autograd.grad(logit, [*model[0].parameters()], retain_graph=True)
            gradient = torch.cat([weight, bias.unsqueeze(1)], 1)
            expected += p * gradient.square() / len(data)
    torch.testing.assert_close(found.blocks["0"].diagonal().view(5, 5), expected)
