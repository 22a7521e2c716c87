import pytest
import torch
from helpers.layer_calls import draw
from torch import nn
from torch.nn import functional as F

from lightning_fedfisher.extraction.backends.backpack import (
    BackpackDiagonal,
    BackpackError,
    why_unsupported,
)
from lightning_fedfisher.extraction.tracing.model_trace import ModelTracer
from lightning_fedfisher.layers import find_layers


class _Net(nn.Module):
    def __init__(self, forward, **modules):
        super().__init__()
        self._forward = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self._forward(self, x)


def _why_unsupported(model, x):
    layers = find_layers(model)
    tracer = ModelTracer(model, layers)
    with tracer.watch():
        logits = model(x)
    return why_unsupported(model, layers, tracer.trace(logits))


def _conv(**options):
    return nn.Sequential(nn.Conv2d(2, 3, 2, **options), nn.Flatten(), nn.LazyLinear(3))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (_conv, ""),
        (lambda: _conv(padding="same", dilation=2), ""),
        (lambda: _conv(padding="same"), "0 has uneven padding"),
        (lambda: _conv(padding=1, padding_mode="reflect"), "0 has padding_mode='reflect'"),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.PReLU(), nn.Linear(32, 3)),
            "1: it is used by an operation that is not known",
        ),
        (lambda: nn.Sequential(nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(32, 3)), "GroupNorm"),
        (
            lambda: _Net(
                lambda n, x: n.out(n.body(n.body(x.flatten(1)))),
                body=nn.Linear(32, 32),
                out=nn.Linear(32, 3),
            ),
            "body runs more than once",
        ),
    ],
)
def test_models_it_does_not_support_have_a_reason(build, reason):
    model, x = build(), torch.randn(4, 2, 4, 4)
    model(x)
    found = _why_unsupported(model, x)
    assert (reason in found) if reason else found == ""


def test_its_sums_are_the_squares_of_each_samples_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2, padding="same", dilation=2), nn.ReLU(True), nn.Flatten()
    )
    model = model.append(nn.Linear(48, 3)).double()
    x, directions = draw(4, 2, 4, 4), [draw(4, 3, seed=seed) for seed in (1, 2)]
    layers = find_layers(model)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for sample in range(4):
        for direction in directions:
            model.zero_grad()
            model(x[sample : sample + 1]).backward(direction[sample : sample + 1])
            for name, p in model.named_parameters():
                expected[name] += p.grad**2
    model.zero_grad()
    sums = BackpackDiagonal(model, layers)
    with sums.watch():
        logits = model(x)
    sums.backward(x, logits, directions)
    found = sums.finish("diagonal", lambda tensor: 2 * tensor, count=8)
    for layer in layers:
        torch.testing.assert_close(found[layer.name].diagonal(), layer.join(expected) / 4)
    assert {(r.kind, r.backend) for r in sums.layer_reports("diagonal")} == {
        ("diagonal", "backpack")
    }


def test_what_shows_only_when_it_runs_is_an_error_of_its_own():
    changed = _Net(
        lambda n, x: n.out(F.relu_(n.body(x))), body=nn.Linear(4, 4), out=nn.Linear(4, 3)
    )
    sums = BackpackDiagonal(changed, find_layers(changed))
    with pytest.raises(BackpackError, match="changed in place"), sums.watch():
        changed(torch.randn(2, 4))
    bare = _Net(lambda n, x: F.linear(x, n.out.weight, n.out.bias), out=nn.Linear(4, 3))
    sums = BackpackDiagonal(bare, find_layers(bare))
    with sums.watch():
        logits = bare(torch.randn(2, 4))
    with pytest.raises(BackpackError, match="without its module"):
        sums.backward(None, logits, [torch.ones(2, 3)])


def test_other_errors_of_a_forward_pass_stay_what_they_are():
    model = nn.Linear(4, 3)
    sums = BackpackDiagonal(model, find_layers(model))
    with pytest.raises(RuntimeError, match="shapes") as caught, sums.watch():
        model(torch.randn(2, 5))
    assert not isinstance(caught.value, BackpackError)
