"""Parameters of which every sample gets a copy: followed through a model, and exact."""

import pytest
import torch
from helpers.networks import Net, extract
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset


def _parameter(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))


def _pooled(net, x):
    return net.head(torch.tanh(x).mean(1))


class _Norm(nn.Module):
    """A layer norm by hand: two parameters of one layer, each used on its own."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = _parameter(4), _parameter(4, seed=2)

    def forward(self, x):
        return self.weight * F.layer_norm(x, (4,)) + self.bias


def _first_row_doubled(tensor):
    tensor[:1] *= 2
    return tensor


INDEX = torch.tensor([[0, 1, 2], [1, 0, 1], [2, 1, 0]])
# The forward pass of tokens of shape (samples, 3, 4), and the parameter it uses.
FOLLOWED = {
    "added": (lambda net, x: _pooled(net, x + net.own), (3, 4)),
    "added with a first dimension of one": (lambda net, x: _pooled(net, net.own + x), (1, 3, 4)),
    "added in place": (lambda net, x: _pooled(net, torch.tanh(x).add_(net.own)), (1, 3, 4)),
    "by alpha": (lambda net, x: _pooled(net, torch.add(x, net.own, alpha=0.5)), (3, 4)),
    "subtracted from": (lambda net, x: _pooled(net, net.own - x), (4,)),
    "divided by": (lambda net, x: _pooled(net, x / (2 + net.own.sigmoid())), (4,)),
    "scale with spread dimensions": (
        lambda net, x: _pooled(net, (x.mT * net.own).mT),
        (4, 1),
    ),
    "temperature": (lambda net, x: _pooled(net, x * net.own.exp()), ()),
    "token": (
        lambda net, x: _pooled(net, torch.cat([net.own.expand(len(x), -1, -1), x], 1)),
        (1, 1, 4),
    ),
    "token repeated": (
        lambda net, x: _pooled(net, torch.cat([net.own.repeat(len(x), 1, 1), x], 1)),
        (1, 1, 4),
    ),
    "token expanded as": (
        lambda net, x: _pooled(net, torch.cat([net.own.expand_as(x[:, :1]), x], 1)),
        (1, 1, 4),
    ),
    "a part": (lambda net, x: _pooled(net, x + net.own[1:4]), (6, 4)),
    "twice": (lambda net, x: _pooled(net, x * net.own + net.own.cos()), (4,)),
    "in reshaped and permuted form": (
        lambda net, x: _pooled(net, x + net.own.view(4, 3).T.unsqueeze(0)),
        (2, 6),
    ),
    "table by position": (
        lambda net, x: _pooled(net, torch.softmax(x @ x.mT + net.own[INDEX].squeeze(2), 2) @ x),
        (3, 1),
    ),
    "embedding of positions": (
        lambda net, x: _pooled(net, x + F.embedding(torch.arange(3).unsqueeze(0), net.own)),
        (5, 4),
    ),
    "in place of masked tokens": (
        lambda net, x: _pooled(net, torch.where(x[:, :, :1] > 0, x, net.own)),
        (4,),
    ),
    "beside an embedding that is tied": (
        lambda net, x: F.linear(
            torch.tanh(F.embedding((x[:, :, 0] > 0).long(), net.head.weight) + net.own).mean(1),
            net.head.weight,
            net.head.bias,
        ),
        (3, 4),
    ),
    "frames folded": (
        lambda net, x: _pooled(net, (x.flatten(0, 1).unsqueeze(1) * net.own).view(-1, 3, 4)),
        (1, 4),
    ),
}
# Used in ways that are not followed, and so by torch.func: as exact.
ALONE = {
    "as a matrix on the left": (lambda net, x: _pooled(net, net.own @ x), (3, 3)),
    "as a matrix transposed": (lambda net, x: _pooled(net, x @ net.own.T), (4, 4)),
    "added to itself in another form": (
        lambda net, x: _pooled(net, x + (net.own + net.own.flip(0))),
        (3, 4),
    ),
    "changed by a constant": (lambda net, x: _pooled(net, x + net.own * torch.ones(4)), (4,)),
    "positions first": (
        lambda net, x: net.head(torch.tanh(x.transpose(0, 1) + net.own).mean(0)),
        (3, 1, 4),
    ),
    "changed in place": (
        lambda net, x: _pooled(net, x + _first_row_doubled(net.own.clone())),
        (3, 4),
    ),
    "beside itself detached": (
        lambda net, x: _pooled(net, x * net.own.detach().exp() + x @ torch.diag(net.own)),
        (4,),
    ),
}


def _squares(model, data):
    """Squares of each sample's gradient, by a backward pass for each sample alone."""
    names = dict(model.named_parameters())
    squares = {name: torch.zeros_like(p) for name, p in names.items()}
    for sample, label in data:
        logits = model(sample.unsqueeze(0)).squeeze(0)
        residual = F.one_hot(label, 3) - torch.softmax(logits.detach(), 0)
        scalar = (logits * residual / residual.norm()).sum()
        for name, g in zip(names, torch.autograd.grad(scalar, list(names.values())), strict=True):
            squares[name] += g**2 / len(data)
    return squares


def _data(samples=11):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 3, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.arange(samples) % 3)


def _check(model, backend, kind, layer):
    data = _data()
    found = extract(model, data, kind)
    squares = _squares(model, data)
    reports = {report.layer.name: report for report in found.layer_reports}
    assert reports[layer].backend == backend
    (own,) = [one for one in found.layers if one.name == layer]
    expected = torch.cat([squares[n].reshape(own.shape[0], -1) for n in own.parameter_names], dim=1)
    torch.testing.assert_close(found.blocks[layer].diagonal(), expected, rtol=1e-10, atol=1e-14)


def _net(forward, shape):
    torch.manual_seed(0)
    model = Net(forward, head=nn.Linear(4, 3)).double()
    model.own = _parameter(*shape)
    return model


@pytest.mark.parametrize("kind", ["diagonal", "kfac", "dense"])
@pytest.mark.parametrize("name", FOLLOWED)
def test_a_parameter_is_followed_to_where_samples_get_their_copy(name, kind):
    _check(_net(*FOLLOWED[name]), "hooks", kind, "own")


@pytest.mark.parametrize("kind", ["diagonal", "kfac"])
@pytest.mark.parametrize("name", ALONE)
def test_what_cannot_be_followed_is_computed_sample_by_sample(name, kind):
    _check(_net(*ALONE[name]), "torch.func", kind, "own")


@pytest.mark.parametrize("kind", ["diagonal", "kfac", "dense"])
def test_two_parameters_of_a_layer_are_two_columns(kind):
    torch.manual_seed(0)
    model = Net(lambda net, x: _pooled(net, net.norm(x)), norm=_Norm(), head=nn.Linear(4, 3))
    _check(model.double(), "hooks", kind, "norm")


def test_a_last_batch_of_one_sample_is_no_exception():
    forward, shape = FOLLOWED["added"]
    model, data = _net(forward, shape), _data(5)
    expected, found = (extract(model, data, "diagonal", batch_size=n) for n in (5, 4))
    torch.testing.assert_close(found.blocks["own"].values, expected.blocks["own"].values)
