import pytest
import torch
from helpers.layer_calls import draw, sorted_rows
from torch import nn

from lightning_fedfisher.extraction.backends.output_gradients import OutputGradients
from lightning_fedfisher.extraction.tracing.model_trace import ModelTracer
from lightning_fedfisher.layers import find_layers


def _collector(model, batch):
    layers, found = find_layers(model), []
    tracer = ModelTracer(model, layers)
    with tracer.watch():
        logits = model(batch)
    trace = tracer.trace(logits)
    take = lambda layer, calls: found.append((layer.name, calls))  # noqa: E731
    return OutputGradients(model, layers, trace, take), found


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()


def test_each_layer_comes_once_with_all_directions():
    model, x = _net(), draw(6, 4)
    directions = [draw(6, 3, seed=seed) for seed in (1, 2)]
    expected = {}
    for sample in range(6):
        for direction in directions:
            logits = model(x[sample : sample + 1])
            for name in ("0", "2"):
                weight, bias = model[int(name)].weight, model[int(name)].bias
                each = torch.autograd.grad(
                    logits, [weight, bias], direction[sample : sample + 1], retain_graph=True
                )
                whole = torch.cat([each[0], each[1].unsqueeze(1)], dim=1)
                expected.setdefault(name, []).append(whole)
    collector, found = _collector(model, x)
    with collector.watch():
        logits = model(x)
    collector.backward(logits, directions)
    assert sorted(name for name, _ in found) == ["0", "2"]
    for name, (call,) in found:
        gradients = call.layer_type.per_sample_gradients(call.inputs, call.gradients, 6)
        torch.testing.assert_close(sorted_rows(gradients), sorted_rows(torch.stack(expected[name])))


def test_no_gradient_of_a_weight_is_computed():
    model, x = _net(), draw(6, 4)
    collector, _ = _collector(model, x)
    assert not any(p.requires_grad for p in model.parameters())
    with collector.watch():
        logits = model(x)
    collector.backward(logits, [draw(6, 3)])
    assert all(p.grad is None for p in model.parameters())


def test_a_forward_pass_with_other_calls_is_refused():
    model, x = _net(), draw(6, 4)
    collector, found = _collector(model, x)
    with collector.watch():
        logits = model[0](x)
    with pytest.raises(ValueError, match="call different layers"):
        collector.backward(logits, [torch.ones_like(logits)])
    with collector.watch(), pytest.raises(ValueError, match="call different layers"):
        model[2](draw(6, 5))
    assert found == []


def _step_by_step(net, x):
    states = x.new_zeros(len(x), 3)
    for position in x.unbind(1):
        states = torch.tanh(net["inputs"](position) + net["states"](states))
    return net["head"](states)


class _Unrolled(nn.ModuleDict):
    def forward(self, x):
        return _step_by_step(self, x)


def _unrolled():
    torch.manual_seed(0)
    sizes = {"inputs": (4, 3), "states": (3, 3), "head": (3, 2)}
    return _Unrolled({name: nn.Linear(*size) for name, size in sizes.items()}).double()


@pytest.mark.parametrize("length", [1, 3, 5, 7])
def test_calls_of_one_form_are_joined_however_many_there_are(length):
    """As for sequences that are longer in one batch than in another."""
    model, x = _unrolled(), draw(6, length, 4)
    directions = [draw(6, 2, seed=seed) for seed in (1, 2)]
    expected = {name: [] for name in model}
    for sample in range(6):
        for direction in directions:
            logits = model(x[sample : sample + 1])
            for name, part in model.items():
                each = torch.autograd.grad(
                    logits,
                    [part.weight, part.bias],
                    direction[sample : sample + 1],
                    retain_graph=True,
                )
                expected[name].append(torch.cat([each[0], each[1].unsqueeze(1)], dim=1))
    collector, found = _collector(model, draw(6, 5, 4))
    with collector.watch():
        logits = model(x)
    collector.backward(logits, directions)
    assert sorted(name for name, _ in found) == sorted(model)
    for name, (call,) in found:
        assert len(call.inputs) == (6 if name == "head" else 6 * length)
        gradients = call.layer_type.per_sample_gradients(call.inputs, call.gradients, 6)
        torch.testing.assert_close(sorted_rows(gradients), sorted_rows(torch.stack(expected[name])))


class _Again(nn.Sequential):
    """Runs its last layer more often for a wider batch."""

    def forward(self, x):
        x = self[1](torch.relu(self[0](x)))
        return x if len(x) < 6 else self[1](x)


def test_a_layer_whose_source_is_known_is_called_once():
    torch.manual_seed(0)
    model = _Again(nn.Linear(4, 3), nn.Linear(3, 3)).double()
    collector, _ = _collector(model, draw(3, 4))
    with collector.watch(), pytest.raises(ValueError, match="call different layers"):
        model(draw(6, 4))


def test_calls_with_samples_at_different_places_are_as_many_as_before():
    """Else it could not be told which of them is missing."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.often = nn.Linear(4, 4), nn.Linear(4, 2), True

        def forward(self, x):
            x = torch.tanh(self.body(x.transpose(0, 1))).mean(0)
            return self.head(self.body(x) if self.often else x)

    model = Mixed().double()
    collector, _ = _collector(model, draw(3, 5, 4))
    model.often = False
    with collector.watch():
        logits = model(draw(3, 5, 4))
    with pytest.raises(ValueError, match="call different layers"):
        collector.backward(logits, [torch.ones_like(logits)])
