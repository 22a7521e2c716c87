"""The head that is fitted in closed form: the fit, which layer it is, and what is left alone."""

import copy

import pytest
import torch
from helpers.ranks import run_ranks
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher.errors import UnsupportedModelError
from lightning_fedfisher.extraction.closed_form_head import extract_closed_form_head
from lightning_fedfisher.extraction.options import ExtractionOptions


def _model(dtype=torch.float32, bias=True, outputs=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Tanh())
        model = nn.Sequential(body, nn.Linear(6, outputs, bias=bias)).to(dtype)
    model[0][1].running_mean.normal_(generator=torch.Generator().manual_seed(1))
    return model


def _data(samples=40, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 4, generator=generator).to(dtype)
    return TensorDataset(x, torch.randint(0, 3, (samples,), generator=generator))


def _fit(model, data, head=None, batch_size=16, shard=None, **options):
    loader = DataLoader(data, batch_size=batch_size, shuffle=True)
    return extract_closed_form_head(
        model, loader, head, ExtractionOptions(**options), shard=shard, progress=False
    )


def _by_lstsq(model, x, y, bias=True):
    """The fit by PyTorch's solver, from the features of the body in eval mode."""
    features = model[0].eval()(x).detach().double()
    inputs = torch.cat([features, torch.ones(len(x), 1)], dim=1) if bias else features
    fit = torch.linalg.lstsq(inputs, y.double()).solution.mT
    return fit, inputs, (inputs @ fit.mT - y).square().sum() / len(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_least_squares_fit_of_one_hot_labels(dtype, bias):
    model, data = _model(dtype, bias), _data(dtype=dtype)
    found = _fit(model, data)
    x, y = data.tensors
    fit, inputs, error = _by_lstsq(model, x, functional.one_hot(y, 3), bias)
    (layer,) = found.layers
    weights = layer.join(dict(found.fitted.named_parameters()))
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype is torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(weights, fit, **close)
    gram = found.blocks["1"].column_factor
    torch.testing.assert_close(gram, inputs.mT @ inputs / 40, **close)
    assert found.fit.squared_error == pytest.approx(float(error), rel=1e-5)
    assert found.fit.observations == 1
    assert (weights.dtype, gram.dtype) == (torch.float64, torch.float64)
    assert (found.num_samples, found.population, found.output_layer) == (40, 40, "1")
    assert found.header().fit == found.fit


@pytest.mark.parametrize(("likelihood", "outputs"), [("gaussian", 2), ("bernoulli", 2)])
def test_it_is_a_linear_regression_of_other_labels(likelihood, outputs):
    model, x = _model(torch.float64, outputs=outputs), _data(dtype=torch.float64).tensors[0]
    y = torch.rand(40, outputs, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = _fit(model, TensorDataset(x, y), likelihood=likelihood)
    fit, _, _ = _by_lstsq(model, x, y)
    weights = found.layers[0].join(dict(found.fitted.named_parameters()))
    torch.testing.assert_close(weights, fit, rtol=1e-9, atol=1e-9)


def test_dead_features_have_weights_of_zero():
    model, data = _model(torch.float64), _data(dtype=torch.float64)
    with torch.no_grad():  # what pre-trained networks have: features that all but vanish
        model[0][1].weight[2], model[0][1].bias[2] = 1e-32, 0
        model[0][1].weight[4], model[0][1].bias[4] = 1e-10, 0
    weights = _fit(model, data).fitted[1].weight
    assert not weights[:, 2].any()
    x, y = data.tensors
    fit, _, _ = _by_lstsq(_without(model, 2), x, functional.one_hot(y, 3))
    torch.testing.assert_close(
        weights[:, [0, 1, 3, 4, 5]], fit[:, [0, 1, 3, 4, 5]], rtol=1e-5, atol=0
    )


def _without(model, feature):
    """The model, of which the fit by PyTorch's solver takes one feature for exactly zero."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied[0][1].weight[feature] = 0
    return copied


def test_with_fewer_samples_than_features_it_is_the_smallest_fit():
    model, data = _model(torch.float64), _data(4, dtype=torch.float64)
    found = _fit(model, data)
    x, y = data.tensors
    features = model[0].eval()(x).detach()
    inputs = torch.cat([features, torch.ones(4, 1)], dim=1)
    scale = inputs.square().mean(0).sqrt()
    expected = (torch.linalg.pinv(inputs / scale) @ functional.one_hot(y, 3).double()).mT / scale
    weights = found.layers[0].join(dict(found.fitted.named_parameters()))
    torch.testing.assert_close(weights, expected, rtol=1e-7, atol=1e-7)
    assert found.fit.squared_error < 1e-12


class _PerToken(nn.Module):
    """A class for each token, in the layout that a categorical likelihood takes."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 5), nn.Linear(5, 3)

    def forward(self, tokens):
        return self.head(self.embedding(tokens)).movedim(-1, 1)


def test_positions_that_are_not_observed_do_not_count():
    torch.manual_seed(0)
    model = _PerToken().double()
    tokens, labels = torch.randint(0, 7, (12, 6)), torch.randint(0, 3, (12, 6))
    labels[torch.rand(12, 6) < 0.3] = -100
    found = _fit(model, TensorDataset(tokens, labels), batch_size=5)
    seen = labels != -100
    inputs = torch.cat([model.embedding(tokens[seen]), torch.ones(int(seen.sum()), 1)], dim=1)
    targets = functional.one_hot(labels[seen], 3).double()
    fit = torch.linalg.lstsq(inputs.detach(), targets).solution
    weights = found.layers[0].join(dict(found.fitted.named_parameters()))
    predicted, expected = inputs @ weights.mT, inputs @ fit
    torch.testing.assert_close(predicted, expected, rtol=1e-8, atol=1e-8)
    assert found.blocks["head"].column_factor[-1, -1] == pytest.approx(float(seen.sum()) / 12)
    assert found.fit.observations == pytest.approx(float(seen.sum()) / 12)
    nothing = TensorDataset(tokens, torch.full((12, 6), -100))
    with pytest.raises(ValueError, match="no label of the client is observed"):
        _fit(model, nothing)


class _TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.first(x), self.second(x)


@pytest.mark.parametrize("which", ["first", "second"])
def test_of_several_heads_it_is_the_one_whose_outputs_are_the_logits(which):
    index = ["first", "second"].index(which)
    found = _fit(_TwoHeads(), _data(), forward=lambda m, batch: (m(batch[0])[index], batch[1]))
    assert found.output_layer == which
    with pytest.raises(UnsupportedModelError, match=r"those are: second"):
        _fit(_TwoHeads(), _data(), head="first", forward=lambda m, b: (m(b[0])[1], b[1]))


def test_a_model_without_such_a_layer_is_refused():
    with pytest.raises(UnsupportedModelError, match="no linear layer's outputs are the logits"):
        _fit(nn.Sequential(_model(), nn.LogSoftmax(dim=1)), _data())
    with pytest.raises(UnsupportedModelError, match="nowhere: it is no layer whose outputs"):
        _fit(_model(), _data(), head="nowhere")


class _After(nn.Module):
    """A head whose outputs go through something else."""

    def __init__(self, after):
        super().__init__()
        self.head, self.after = nn.Linear(4, 3), after

    def forward(self, x):
        return self.after(self.head(x))


@pytest.mark.parametrize("after", [torch.neg, torch.tanh, lambda logits: 30 * logits])
def test_a_head_of_zeros_is_found_out_if_something_follows(after):
    model, plain = _After(after), _After(nn.Identity())
    for head in (model.head, plain.head):
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    with pytest.raises(UnsupportedModelError, match="its outputs are not the logits"):
        _fit(model, _data())
    assert _fit(plain, _data()).output_layer == "head"
    assert not plain.head.weight.any()


class _Twice(_After):
    def forward(self, x):
        return self.head(x + 0 * self.head(x).sum())


def test_a_head_that_is_called_twice_is_refused():
    with pytest.raises(UnsupportedModelError, match="called 2 times in a forward pass"):
        _fit(_Twice(None), _data())


def test_rows_that_are_no_samples_are_refused():
    torch.manual_seed(0)
    tokens, labels = torch.randint(0, 7, (12, 6)), torch.randint(0, 3, (12, 6))

    def flat(module, batch):
        return module(batch[0]).movedim(1, -1).reshape(-1, 3), batch[1].reshape(-1)

    with pytest.raises(ValueError, match="more rows of logits than there are samples"):
        _fit(_PerToken(), TensorDataset(tokens, labels), forward=flat)


def test_of_a_stream_the_first_samples_are_taken():
    batches = [tuple(_data(10, seed).tensors) for seed in range(5)]
    options = ExtractionOptions(max_samples=15)
    found = extract_closed_form_head(_model(), iter(batches), None, options, progress=False)
    assert (found.num_samples, found.population) == (20, None)


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(3, 3), nn.Linear(3, 3, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


def test_a_head_that_shares_its_weight_is_refused():
    tokens = torch.randint(0, 3, (8,))
    with pytest.raises(UnsupportedModelError, match="another layer shares it"):
        _fit(_Tied(), TensorDataset(tokens, tokens))


def test_labels_are_needed():
    loader = DataLoader(TensorDataset(torch.randn(4, 4)))
    options = ExtractionOptions(forward=lambda m, batch: m(batch[0]))
    with pytest.raises(ValueError, match="a fit needs labels"):
        extract_closed_form_head(_model(), loader, options=options, progress=False)


def test_the_model_is_left_as_it_was_and_its_body_is_shared():
    model, data = _model().train(), _data()
    model[0][0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    found = _fit(model, data)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["0.0.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())
    trained = [name for name, p in found.fitted.named_parameters() if p.requires_grad]
    assert trained == ["1.weight", "1.bias"]
    assert found.fitted[0][0].weight.data_ptr() == model[0][0].weight.data_ptr()


def test_some_samples_and_batches_of_any_size():
    model, data = _model(torch.float64), _data(dtype=torch.float64)
    whole = _fit(model, data, batch_size=40)
    for batch_size in (1, 7):
        parts = _fit(model, data, batch_size=batch_size)
        torch.testing.assert_close(
            parts.blocks["1"].column_factor, whole.blocks["1"].column_factor, rtol=1e-12, atol=1e-12
        )
    assert _fit(model, data, max_samples=9).num_samples == 9
    assert _fit(model, data, max_samples="auto").num_samples == 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_low_precision_runs_in_float32(dtype):
    model, data = _model().to(dtype), _data()
    found = _fit(model, data)
    expected = _fit(_model().to(dtype).float(), data)
    torch.testing.assert_close(
        found.blocks["1"].column_factor, expected.blocks["1"].column_factor, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_do_not_matter(world_size):
    data = _data(17, dtype=torch.float64)
    alone = _fit(_model(torch.float64), data)

    def work(shard):
        model = _model(torch.float64)
        model[0][1].running_mean += shard.rank  # of which rank 0's is sent
        return _fit(model, data, batch_size=4, shard=shard)

    for found in run_ranks(world_size, work):
        assert found.num_samples == 17
        assert found.fit.squared_error == pytest.approx(alone.fit.squared_error, rel=1e-9)
        for name, tensor in alone.fitted[1].named_parameters():
            other = found.fitted[1].get_parameter(name)
            torch.testing.assert_close(other, tensor, rtol=1e-8, atol=1e-8)
