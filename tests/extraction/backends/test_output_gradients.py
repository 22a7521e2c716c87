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
