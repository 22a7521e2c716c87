"""Copies of a model: how many there are, and what they do not share."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher.extraction import extract_curvature
from lightning_fedfisher.extraction.model_copy import copy_around_parameters, copy_model


@pytest.fixture
def weights_copied(monkeypatch):
    """Names the shape of every parameter that is copied, in their order."""
    copied, original = [], nn.Parameter.__deepcopy__

    def counting(parameter, memo):
        copied.append(tuple(parameter.shape))
        return original(parameter, memo)

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", counting)
    return copied


class Remembering(nn.Module):
    """Its logits depend on what earlier forward passes left, in a list, a number and a buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3).double()
        self.register_buffer("runs", torch.zeros((), dtype=torch.float64))
        self.calls, self.seen = 0, []

    def forward(self, x):
        scale = 1 + self.runs + self.calls + len(self.seen)
        if torch.is_grad_enabled():
            self.runs += 1
            self.calls += 1
            self.seen.append(len(x))
        return self.linear(x * scale)


def _loader(samples=6):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, torch.arange(samples) % 3), batch_size=samples)


@pytest.mark.parametrize("kind", ["diagonal", "dense", "kfac", "ekfac"])
def test_the_weights_are_copied_once_a_pass(kind, weights_copied):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    extract_curvature(model, _loader(), kind, progress=False)
    assert weights_copied == [(5, 4), (5,), (3, 5), (3,)]


def test_the_identity_copies_nothing(weights_copied):
    extract_curvature(nn.Linear(4, 3).double(), _loader(), "identity")
    assert not weights_copied


@pytest.mark.parametrize("kind", ["diagonal", "dense", "kfac", "ekfac"])
def test_what_a_model_remembers_of_tracing_is_not_there_in_the_pass(kind):
    model = Remembering()
    found = extract_curvature(model, _loader(), kind, progress=False)
    expected = extract_curvature(model.linear, _loader(), kind, progress=False)
    names = {"linear": "weight"}
    for name, block in found.blocks.items():
        for part, tensor in block.tensors().items():
            other = expected.blocks[names[name]].tensors()[part]
            torch.testing.assert_close(tensor, other, rtol=0, atol=0)
    assert (float(model.runs), model.calls, model.seen) == (0, 0, [])


def test_copies_around_parameters_share_nothing_else():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.LSTM(3, 2))
    model.table = torch.ones(3)
    copied = copy_around_parameters(model)
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in copied.named_parameters()] == names
    for name in names:
        assert copied.get_parameter(name) is model.get_parameter(name)
    for (_, one), (_, other) in zip(copied.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()
    assert copied.table.data_ptr() != model.table.data_ptr()
    assert not {id(m) for m in copied.modules()} & {id(m) for m in model.modules()}
    x = torch.randn(2, 4)
    torch.testing.assert_close(copied.eval()(x)[0], model.eval()(x)[0])


@pytest.mark.parametrize("copied_by", [copy_around_parameters, lambda model: copy_model(model, {})])
def test_a_copy_has_hooks_and_dictionaries_of_its_own(copied_by):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].cache = model[1].cache = {}
    model[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    copied, seen = copied_by(model), []
    copied[0].register_forward_hook(lambda *arguments: seen.append("copy"))
    copied[0].cache["key"] = 1
    x = torch.randn(2, 4)
    torch.testing.assert_close(copied(x), model(x))
    assert (seen, model[0].cache, copied[1].cache) == (["copy"], {}, {"key": 1})
    assert [type(d) for d in vars(copied[0]).values()] == [type(d) for d in vars(model[0]).values()]


def test_a_copy_takes_other_buffers_and_leaves_the_model_alone():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Embedding(3, 2, sparse=True)).train()
    copied = copy_model(model, {"0.running_mean": torch.tensor([5.0, 6.0])})
    assert copied[0].running_mean.tolist() == [5.0, 6.0]
    assert model[0].running_mean.tolist() == [0.0, 0.0]
    assert (copied.training, copied[1].sparse) == (False, False)
    assert (model.training, model[1].sparse) == (True, True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_copies_are_at_least_float32(dtype):
    assert copy_model(nn.Linear(2, 2).to(dtype), {}).weight.dtype == torch.float32
    assert copy_model(nn.Linear(2, 2).double(), {}).weight.dtype == torch.float64
