"""Calls of layers on their own, and their per-sample gradients by plain autograd."""

import torch

from lightning_fedfisher.extraction.layer_types.registry import read_call
from lightning_fedfisher.extraction.tracing.recorder import LayerCall


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def reference_gradients(func, args, kwargs, parameters, gradients, samples):
    """One sample and direction at a time: ``(samples * directions, rows, columns)``."""
    inputs, *others = args
    rows = len(parameters[0])
    found = []
    by_sample = zip(*(gradient.chunk(samples) for gradient in gradients), strict=True)
    for part, own in zip(inputs.chunk(samples), by_sample, strict=True):
        for gradient in own:
            leaves = [p.detach().requires_grad_() for p in parameters]
            swap = {id(p): leaf for p, leaf in zip(parameters, leaves, strict=True)}
            output = func(
                part,
                *(swap.get(id(value), value) for value in others),
                **{name: swap.get(id(value), value) for name, value in kwargs.items()},
            )
            each = torch.autograd.grad(output, leaves, gradient)
            found.append(torch.cat([g.reshape(rows, -1) for g in each], dim=1))
    return torch.stack(found)


def sorted_rows(gradients):
    """Per-sample gradients in an order that does not depend on that of samples and directions."""
    flat = gradients.flatten(1)
    return flat[(flat @ draw(flat.shape[1], seed=9)).argsort()]


def make_call(func, args, kwargs, has_bias, directions=2):
    """The layer type that is read from a call, and the call with random gradients."""
    read = read_call(func, args, kwargs)
    layer_type = read.bias_type if has_bias is None else read.weight_type(has_bias)
    output = func(*args, **kwargs)
    return LayerCall(layer_type, args[0], draw(directions, *output.shape, seed=3))


def check_gradients(func, args, parameters, *, samples=3, directions=2, lone=False, **kwargs):
    """Per-sample gradients of a call agree with autograd's; returns the layer type."""
    has_bias = None if lone else len(parameters) > 1
    call = make_call(func, args, kwargs, has_bias, directions)
    expected = reference_gradients(func, args, kwargs, parameters, call.gradients, samples)
    found = call.layer_type.per_sample_gradients(call.inputs, call.gradients, samples)
    assert found.shape == expected.shape
    torch.testing.assert_close(sorted_rows(found), sorted_rows(expected))
    return call.layer_type
