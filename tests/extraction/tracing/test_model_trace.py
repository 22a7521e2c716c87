import gc
import weakref

import torch
from torch import nn
from torch.nn import functional as F

from lightning_fedfisher.extraction.tracing.batch_axis import BatchAxis
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


def _trace(model, x):
    tracer = ModelTracer(model, find_layers(model))
    with tracer.watch():
        logits = model(x)
    return tracer.trace(logits)


def test_calls_are_listed_in_order_with_the_samples_in_each():
    model = _Net(
        lambda n, x: n.out(torch.tanh(n.body(torch.tanh(n.body(x.transpose(0, 1))))).mean(0)),
        body=nn.Linear(4, 4),
        out=nn.Linear(4, 3),
    )
    trace = _trace(model, torch.randn(3, 5, 4))
    assert trace.calls == (("body",), ("body",), ("out",))
    assert trace.batch_axes == (BatchAxis(1), BatchAxis(1), BatchAxis(0))
    assert {name: len(calls) for name, calls in trace.layer_types.items()} == {"body": 2, "out": 1}
    assert trace.plain == {"out"}
    assert trace.output_layer == "out"


def _last_of_folded(first):
    """Positions are mixed, then folded with samples, and the last of each sample is read."""

    def forward(net, x):
        x = torch.tanh(net.first(x)).cumsum(1) if first else x.cumsum(1)
        return net.body(x.flatten(0, 1)).view(*x.shape[:2], -1)[:, -1]

    parts = {"first": nn.Linear(2, 2)} if first else {}
    return _Net(forward, body=nn.Linear(2, 3), **parts)


def test_what_one_place_of_each_sample_was_computed_from_tells_how_they_are_folded():
    # Every fourth of twelve places would be of three samples in turn as well.
    x = torch.randn(3, 4, 2)
    trace = _trace(_last_of_folded(first=True), x)
    assert trace.calls == (("first",), ("body",))
    assert trace.batch_axes == (BatchAxis(0), BatchAxis(0, "outer"))
    trace = _trace(_last_of_folded(first=False), x)
    assert trace.unseen == {"body": "its samples cannot be told apart"}


def test_each_reason_for_not_seeing_a_layer_is_told():
    model = _Net(
        lambda n, x: n.out(n.mixed(x - x.mean(0)) * n.scale + F.linear(x, n.twice.weight.T)),
        mixed=nn.Linear(4, 4),
        twice=nn.Linear(4, 4, bias=False),
        out=nn.Linear(4, 3),
    )
    model.scale = nn.Parameter(torch.ones(4))
    trace = _trace(model, torch.randn(3, 4))
    assert trace.unseen == {
        "scale": "it is used by an operation that is not known",
        "twice": "it is used by an operation that is not known",
    }
    assert {*trace.layer_types} == {"mixed", "out"}


def test_samples_that_mix_behind_a_layer_cannot_be_told_apart():
    model = _Net(
        lambda n, x: n.out(n.body(x) - n.body(x).mean(0)),
        body=nn.Linear(4, 4),
        out=nn.Linear(4, 3),
    )
    trace = _trace(model, torch.randn(3, 4))
    assert trace.unseen == {"body": "its samples cannot be told apart"}


def test_layers_that_the_logits_do_not_need_are_named_and_nothing_else():
    model = _Net(lambda n, x: (n.idle(x), n.out(x))[1], idle=nn.Linear(4, 2), out=nn.Linear(4, 3))
    trace = _trace(model, torch.randn(3, 4))
    assert trace.unreached.keys() == {"idle"}
    assert trace.calls == ()
    assert not trace.uncalled  # its output is not used
    model = _Net(lambda n, x: n.out(x), idle=nn.Linear(4, 2), out=nn.Linear(4, 3))
    assert _trace(model, torch.randn(3, 4)).uncalled == {"idle"}


def test_what_varies_takes_along_what_shares_a_call_or_reads_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    trace = _trace(model, torch.randn(3, 4))
    assert trace.fed_by.keys() == {"2", "4"}
    varying = trace.with_varying({"0"})
    assert varying.calls == (("2",), ("4",))
    assert len(varying.batch_axes) == 2
    assert varying.fed_by.keys() == {"4"}
    assert varying.unseen["0"] == "only some batches use it"
    assert "0" not in varying.layer_types.keys() | varying.plain
    assert varying.output_layer == "4"
    assert trace.with_varying({"4"}).output_layer == ""


def test_the_graph_of_the_pass_goes_with_the_tracer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    tracer = ModelTracer(model, find_layers(model))
    gc.disable()
    try:
        with tracer.watch():
            logits = model(torch.randn(3, 4))
        tracer.trace(logits)
        kept, gone = weakref.ref(logits), weakref.ref(tracer)
        del logits, tracer
        assert gone() is None
        assert kept() is None
    finally:
        gc.enable()


def test_no_gradient_of_a_weight_is_computed():
    model, computed = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)), []
    for parameter in model.parameters():
        parameter.register_hook(computed.append)
    trace = _trace(model, torch.randn(3, 4))
    assert trace.batch_axes == (BatchAxis(0), BatchAxis(0))
    assert computed == []


def test_a_model_without_known_calls_has_none_in_its_trace():
    model = _Net(lambda net, x: net.scale * x)
    model.scale = nn.Parameter(torch.ones(4))
    trace = _trace(model, torch.randn(3, 4))
    assert (trace.calls, trace.batch_axes) == ((), ())
    assert set(trace.unseen) == {"scale"}
