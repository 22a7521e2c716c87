import pytest
import torch
from helpers.layer_calls import draw
from torch import nn

from lightning_fedfisher.curvature import EIGEN_CORRECTED, KINDS, Identity
from lightning_fedfisher.extraction.accumulators import model_sums
from lightning_fedfisher.extraction.accumulators.model_sums import ACCUMULATORS, ModelAccumulator
from lightning_fedfisher.extraction.tracing.model_trace import ModelTracer
from lightning_fedfisher.layers import find_layers

CURVATURES = ("diagonal", "kfac", "ekfac", "dense")


def test_every_kind_that_is_extracted_has_an_accumulator():
    assert {*ACCUMULATORS} == {*KINDS} - {Identity.kind, *EIGEN_CORRECTED.values()}


def _sums(curvatures, kept=None, monkeypatch=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 3)).double()
    x, layers = draw(6, 4), find_layers(model)
    tracer = ModelTracer(model, layers)
    with tracer.watch():
        logits = model(x)
    trace = tracer.trace(logits)
    if kept is not None:
        monkeypatch.setattr(model_sums, "_KEPT_BYTES", kept)
    sums = ModelAccumulator(model, layers, trace, curvatures, lambda m, batch: m(batch))
    _run(sums, model, x)
    return sums, model, x


def _run(sums, model, x):
    for half in (x[:3], x[3:]):
        with sums.watch():
            logits = model(half)
        sums.backward(half, logits, [torch.ones(3, 3).double(), draw(3, 3, seed=1)])


def _same(tensor):
    return tensor


def _correct(sums, model, x):
    """Finds the eigenvalues of EKFAC, in a second pass if one is needed."""
    sums.find_eigenbases(_same, _same, 6)
    if sums.needs_second_pass:
        _run(sums, model, x)
    else:
        sums.add_kept()


@pytest.mark.parametrize("kept", [None, 0])
def test_kinds_asked_for_together_are_those_asked_for_alone(kept, monkeypatch):
    together, model, x = _sums(CURVATURES, kept, monkeypatch)
    _correct(together, model, x)
    assert together.needs_second_pass == (kept == 0)
    for curvature in CURVATURES:
        alone, model, x = _sums([curvature])
        if curvature == "ekfac":
            _correct(alone, model, x)
        expected = alone.finish(curvature, _same, 6)
        for name, block in together.finish(curvature, _same, 6).items():
            torch.testing.assert_close(block.dense(), expected[name].dense())


def test_sums_are_reduced_as_copies():
    sums, _, _ = _sums(["diagonal"])
    first = sums.finish("diagonal", lambda tensor: tensor.mul_(2), 6)
    second = sums.finish("diagonal", lambda tensor: tensor.mul_(2), 6)
    for name, block in first.items():
        assert torch.equal(block.values, second[name].values)


def test_reports_name_backend_and_reason():
    sums, _, _ = _sums(["kfac", "diagonal"])
    told = {r.layer.name: (r.kind, r.backend, r.reason) for r in sums.layer_reports("kfac")}
    assert told == {
        "0": ("kronecker", "hooks", ""),
        "1": ("diagonal", "torch.func", "it is used by an operation that is not known"),
        "2": ("kronecker", "hooks", ""),
    }
