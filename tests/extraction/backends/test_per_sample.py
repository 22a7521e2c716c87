import pytest
import torch
from helpers.layer_calls import draw
from torch import nn

from lightning_fedfisher.extraction.backends import per_sample
from lightning_fedfisher.extraction.backends.per_sample import PerSampleGradients
from lightning_fedfisher.extraction.batches import MixedSamplesError
from lightning_fedfisher.layers import find_layers


def _run(model, x, directions):
    gradients = PerSampleGradients(model, find_layers(model), lambda m, batch: m(batch))
    chunks = list(gradients(x, model(x).detach(), directions))
    return {name: [chunk[name] for chunk in chunks] for name in chunks[0]}


def _reference(model, x, directions):
    parameters = [p for p in model.parameters() if p.requires_grad]
    each = []
    for sample, direction in zip(x, directions, strict=True):
        output = model(sample.unsqueeze(0))
        gradients = torch.autograd.grad(output, parameters, direction.unsqueeze(0))
        each.append(torch.cat([g.reshape(len(g), -1) for g in gradients], dim=1))
    return torch.stack(each)


class _Cube(torch.autograd.Function):
    """Without a batched form."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


class _Cubed(nn.Linear):
    def forward(self, x):
        return _Cube.apply(super().forward(x))


@pytest.mark.parametrize("kind", [nn.Linear, _Cubed])
def test_gradients_are_those_of_each_sample_alone(kind):
    torch.manual_seed(0)
    model, x, directions = kind(4, 3).double(), draw(5, 4), draw(5, 3, seed=1)
    (found,) = _run(model, x, directions)["weight"]
    torch.testing.assert_close(found, _reference(model, x, directions))


def test_chunks_of_samples_are_all_of_them(monkeypatch):
    monkeypatch.setattr(per_sample, "_CHUNK_NUMEL", 2 * 15)
    torch.manual_seed(0)
    model, x, directions = nn.Linear(4, 3).double(), draw(5, 4), draw(5, 3, seed=1)
    chunks = _run(model, x, directions)["weight"]
    assert [len(chunk) for chunk in chunks] == [2, 2, 1]
    torch.testing.assert_close(torch.cat(chunks), _reference(model, x, directions))


def test_samples_that_depend_on_each_other_are_refused():
    class Mixed(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    with pytest.raises(MixedSamplesError):
        _run(Mixed(4, 3).double(), draw(5, 4), draw(5, 3))


def test_attention_leaves_its_fast_path_and_the_switch_of_the_process_alone():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.0).double().eval()
    model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(12, 3).double())
    found = _run(model, draw(2, 3, 4), draw(2, 3, seed=1))
    assert torch.backends.mha.get_fastpath_enabled()
    assert found["0.self_attn.in_proj_weight"][0].abs().sum() > 0


def test_no_graph_is_kept_of_parameters_that_require_gradients():
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    (_, last) = find_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    batch = torch.randn(4, 2)
    gradients = PerSampleGradients(model, [last], lambda m, x: m(x))
    (found,) = gradients(batch, model(batch).detach(), torch.ones(4, 1))
    assert not any(tensor.requires_grad for tensor in found.values())
    hidden = torch.tanh(model[0](batch)).detach()
    expected = torch.cat([hidden, torch.ones(4, 1)], dim=1).unsqueeze(1)
    torch.testing.assert_close(found["2"], expected)
