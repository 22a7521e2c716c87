"""Curvature by its definitions: Jacobians of each sample's logits, and the Fisher of logits."""

import functools
import itertools

import numpy as np
import torch
from helpers.networks import (
    CLASSES,
    MC,
    NETS,
    OPENED,
    SAMPLES,
    USED_OTHERWISE,
    Scaled,
    build_net,
    make_data,
)
from torch import nn
from torch.func import jacrev
from torch.nn import functional as F

from lightning_fedfisher.layers import find_layers

KRONECKER = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose2d,
    nn.Embedding,
)


def reference_modules(net, model):
    """Modules whose layer has Kronecker factors, by the layer's name."""
    modules = {}
    for layer in find_layers(model):
        module = model.get_submodule(layer.module_name)
        has = isinstance(module, KRONECKER) and getattr(module, "groups", 1) == 1
        weight = layer.parameter_names[0].endswith("weight")
        if has and weight and layer.name not in USED_OTHERWISE.get(net, ()):
            modules[layer.name] = module
    return modules


def _reference_logit_fisher(logits, labels, fisher):
    """The Fisher with respect to each sample's logits, ``(samples, classes, classes)``."""
    p = torch.softmax(logits, dim=1)
    if fisher == "exact":
        return torch.stack([torch.diag(row) - torch.outer(row, row) for row in p])
    if fisher == "mc":
        uniforms = [
            np.random.default_rng((MC["seed"], place)).random(MC["draws"])
            for place in range(len(logits))
        ]
        cumulative = p.cumsum(1).numpy()
        drawn = [[int((cumulative[i] <= u).sum()) for u in uniforms[i]] for i in range(len(logits))]
        residuals = torch.eye(CLASSES, dtype=p.dtype)[torch.tensor(drawn)] - p.unsqueeze(1)
        return torch.einsum("snc,snd->scd", residuals, residuals) / MC["draws"]
    residual = torch.eye(CLASSES, dtype=p.dtype)[labels] - p
    moment = torch.einsum("sc,sd->scd", residual, residual)
    return moment / (residual**2).sum(1)[:, None, None] if fisher == "normalised" else moment


def _reference_jacobians(model, x):
    """d logits / d parameters of each layer, ``(samples, classes, out, in)``, bias last."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    by_sample = []
    for sample in x:
        logits = model(sample.unsqueeze(0)).squeeze(0)
        rows = [
            torch.autograd.grad(v, list(parameters.values()), retain_graph=True) for v in logits
        ]
        by_sample.append([torch.stack(gradients) for gradients in zip(*rows, strict=True)])
    jacobians = dict(zip(parameters, map(torch.stack, zip(*by_sample, strict=True)), strict=True))
    return {
        layer.name: torch.cat(
            [
                jacobians[name].reshape(len(x), CLASSES, layer.shape[0], -1)
                for name in layer.parameter_names
            ],
            dim=3,
        )
        for layer in find_layers(model)
    }


def _reference_windows(module, image, places):
    """What a kernel covers at each place of a padded image: ``(places, channels * elements)``."""
    spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    padding = module.padding
    if isinstance(padding, str):
        padding = [span // 2 if padding == "same" else 0 for span in spans]
    channels, *sizes = image.shape
    if getattr(module, "padding_mode", "zeros") == "circular":
        padded = F.pad(image[None], [p for p in reversed(padding) for _ in range(2)], "circular")[0]
    else:
        padded = image.new_zeros(
            channels, *(n + 2 * s + 6 for n, s in zip(sizes, spans, strict=True))
        )
        inside = tuple(slice(p, p + n) for p, n in zip(padding, sizes, strict=True))
        padded[(slice(None), *inside)] = image
    windows = []
    for place in itertools.product(*map(range, places)):
        window = tuple(
            slice(i * s, i * s + span + 1, d)
            for i, s, span, d in zip(place, module.stride, spans, module.dilation, strict=True)
        )
        windows.append(padded[(slice(None), *window)].flatten())
    return torch.stack(windows)


def _reference_inputs(module, x, output, columns):
    """What the inputs contribute at each position: ``(positions, in)``, tokens as unit vectors."""
    weight = module.weight.detach()
    if isinstance(module, nn.Embedding):
        return F.one_hot(x.flatten(), len(weight)).to(weight) * (
            1 if module.padding_idx is None else (x.flatten() != module.padding_idx)[:, None]
        )
    if isinstance(module, nn.ConvTranspose2d):
        return x[0].flatten(1).T
    if isinstance(module, nn.Linear):
        rows, seen = x.reshape(-1, x.shape[-1]), output.reshape(-1, output.shape[-1])
    else:
        rows = torch.cat([_reference_windows(module, one, output.shape[2:]) for one in x])
        seen = torch.cat([one.flatten(1).T for one in output])
    weight = weight.flatten(1)
    if module.bias is not None:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        weight = torch.cat([weight, module.bias.detach().unsqueeze(1)], dim=1)
    seen = seen / 2 if isinstance(module, Scaled) else seen
    torch.testing.assert_close(rows @ weight.T, seen, rtol=0, atol=1e-12)  # the oracle's own test
    return rows[:, :columns]  # without a bias that is frozen, or another layer's


def _reference_gradients(module, x, jacobian):
    """What d logits / d output contributes at each position: ``(classes, features, positions)``."""
    if isinstance(module, nn.ConvTranspose2d):
        windows = [_reference_windows(module, one, x.shape[2:]).T for one in jacobian[:, 0]]
        return torch.stack(windows)
    if isinstance(module, nn.Linear | nn.Embedding):
        features = jacobian.reshape(CLASSES, -1, jacobian.shape[-1]).mT
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            features = features * (x.flatten() != module.padding_idx)
        return features * (2 if isinstance(module, Scaled) else 1)
    return jacobian.movedim(2, 1).flatten(2)


def _reference_sides(net, model, sample):
    """Of one sample and each layer: both sides of its gradient, over the positions of all calls."""
    calls, shifts = [], []
    names = {module: name for name, module in reference_modules(net, model).items()}
    tied = {id(module.weight): name for module, name in reversed(list(names.items()))}

    def record(module, args, output):
        # Clones, since what follows may work in place.
        calls.append((module, args[0].detach().clone(), output.detach().clone()))

    def shift(module, args, output):
        return output + next(shifts)

    def logits_of(zeros):
        nonlocal shifts
        shifts = iter(zeros)
        return model(sample.unsqueeze(0)).squeeze(0)

    called = [m for m in model.modules() if id(getattr(m, "weight", None)) in tied]
    handles = [module.register_forward_hook(record) for module in called]
    model(sample.unsqueeze(0))
    for handle in handles:
        handle.remove()
    if not calls:
        return {}
    handles = [module.register_forward_hook(shift) for module in called]
    jacobians = jacrev(logits_of)(tuple(torch.zeros_like(output) for _, _, output in calls))
    for handle in handles:
        handle.remove()
    columns = {layer.name: layer.shape[1] for layer in find_layers(model)}
    sides = {}
    for (module, x, output), jacobian in zip(calls, jacobians, strict=True):
        name = tied[id(module.weight)]
        inputs = _reference_inputs(module, x, output, columns[name])
        gradients = _reference_gradients(module, x, jacobian.detach())
        sides.setdefault(name, []).append((inputs, gradients))
    return {
        name: (torch.cat([i for i, _ in found]), torch.cat([g for _, g in found], dim=2))
        for name, found in sides.items()
    }


@functools.cache
def _reference_pass(net, samples=SAMPLES):
    model = build_net(net).eval()
    x, _ = make_data(NETS[net][1], samples).tensors
    with torch.no_grad():
        logits = torch.cat([model(sample.unsqueeze(0)) for sample in x])
    jacobians = _reference_jacobians(model, x)
    sides = [_reference_sides(net, model, sample) for sample in x]
    return logits, jacobians, sides


def _reference_factors(net, model, name, sides, middle):
    inputs = torch.stack([i.T @ i / len(i) for i, _ in sides]).mean(0)
    gradients = torch.stack(
        [torch.einsum("cot,cd,dpt->op", j, m, j) for (_, j), m in zip(sides, middle, strict=True)]
    ).mean(0)
    module = reference_modules(net, model)[name]
    if isinstance(module, nn.Embedding):
        return {"row_values": inputs.diagonal(), "column_factor": gradients}
    if isinstance(module, nn.ConvTranspose2d):
        return {"row_factor": inputs, "column_factor": gradients}
    return {"row_factor": gradients, "column_factor": inputs}


def reference_blocks(net, kind, fisher, samples=SAMPLES):
    """The tensors of each layer's block, from definitions alone."""
    logits, jacobians, sides = _reference_pass(net, samples)
    labels = make_data(NETS[net][1], samples).tensors[1]
    middle = _reference_logit_fisher(logits, labels, fisher)
    model = build_net(net)
    factored = reference_modules(net, model) if kind == "kfac" else {}
    blocks = {}
    for name, jacobian in jacobians.items():
        if kind == "kfac" and name.endswith(OPENED):
            continue
        if name in factored:
            own = [side[name] for side in sides]
            blocks[name] = _reference_factors(net, model, name, own, middle)
        else:
            flat = jacobian.flatten(2)
            dense = torch.einsum("sci,scd,sdj->ij", flat, middle, flat) / len(flat)
            diagonal = dense.diagonal().reshape(jacobian.shape[2:])
            blocks[name] = {"matrix": dense} if kind == "dense" else {"values": diagonal}
    return blocks


def tensors_of(block):
    """What a block holds; of an eigendecomposition, which is not unique, what it stands for."""
    return {"matrix": block.dense()} if "ekfac" in block.kind else block.tensors()


def relative_error(extracted, expected):
    """The largest error of any tensor, relative to the largest entry of that tensor."""
    assert {n for n in extracted.blocks if not n.endswith(OPENED)} <= set(expected)
    worst = 0.0
    for name, tensors in expected.items():
        found = tensors_of(extracted.blocks[name])
        assert set(found) == set(tensors), name
        for field, tensor in tensors.items():
            assert found[field].shape == tensor.shape
            error = (found[field].double() - tensor).abs().max() / tensor.abs().max()
            worst = max(worst, float(error))
    return worst


def are_equal(one, two, tolerance=0.0):
    """Whether two extractions found the same curvature, up to a tolerance."""
    expected = {name: tensors_of(block) for name, block in two.blocks.items()}
    return relative_error(one, expected) <= tolerance
