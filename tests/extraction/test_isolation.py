"""The user's module and the world around it are left as they were."""

import copy
import gc
import random
import weakref

import numpy as np
import pytest
import torch
from backpack.context import CTX
from helpers.networks import BATCH, CLASSES, EXTRACTED, IMAGE, build_net, extract, make_data
from oracles.curvature import are_equal
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_fedfisher.extraction import data_pass

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _prepared_model():
    """A model in the middle of training: mixed modes, gradients, a hook of the user's own."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(108, 5),
        nn.Linear(5, CLASSES),
    ).train()
    model[2].eval()
    model[4].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[4].register_forward_hook(lambda module, args, output: None)
    return model


def _snapshot(model):
    """Everything about a model and the process that extraction could disturb."""
    modules = {}
    for path, module in model.named_modules():
        modules[path] = (
            module.training,
            tuple(tuple(getattr(module, hooks)) for hooks in HOOKS),
            sorted(module.__dict__),
            getattr(module, "inplace", None),
        )
    parameters = {}
    for name, p in model.named_parameters():
        grad = None if p.grad is None else (id(p.grad), p.grad.tolist())
        state = (p.requires_grad, p.dtype, p.data_ptr(), p._version, p._backward_hooks)
        parameters[name] = (id(p), p.tolist(), grad, sorted(p.__dict__), *state)
    name, keys, *rest = np.random.get_state()
    return {
        "modules": modules,
        "parameters": parameters,
        "buffers": {key: buffer.tolist() for key, buffer in model.named_buffers()},
        "torch": torch.get_rng_state().tolist(),
        "numpy": (name, keys.tolist(), *rest),
        "python": random.getstate(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "backpack": len(CTX.hook_handles),
    }


def _noisy_forward(model, batch):
    """Draws from every generator, as a careless forward pass or transform may."""
    x = batch[0] + 1e-9 * (torch.rand(()) + np.random.rand() + random.random())
    return model(x)


@pytest.mark.parametrize("kind", EXTRACTED)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_everything_is_left_as_it_was(kind, mode):
    model, data = _prepared_model(), make_data(IMAGE)
    with mode():
        before = _snapshot(model)
        extract(model, data, kind, fisher="mc", max_samples=5, forward=_noisy_forward)
        after = _snapshot(model)
    for part, value in before.items():
        assert after[part] == value, part


@pytest.mark.parametrize("kind", EXTRACTED)
def test_inference_mode_around_the_call(kind):
    model, data = _prepared_model(), make_data(IMAGE)
    expected = extract(model, data, kind)
    with torch.inference_mode():
        before = _snapshot(model)
        found = extract(model, data, kind)
        assert _snapshot(model) == before
    assert are_equal(found, expected)


@pytest.mark.parametrize("kind", EXTRACTED)
def test_everything_is_left_as_it_was_after_a_failure(kind):
    def batches():
        yield from DataLoader(make_data(IMAGE), batch_size=BATCH)
        raise OSError("the disk is gone")

    model = _prepared_model()
    before = _snapshot(model)
    with pytest.raises(OSError, match="the disk is gone"):
        extract(model, batches(), kind, fisher="mc", forward=_noisy_forward)
    after = _snapshot(model)
    for part, value in before.items():
        assert after[part] == value, part


@pytest.mark.parametrize("kind", EXTRACTED)
def test_no_grad_and_autocast_around_the_call_change_no_number(kind):
    model, data = build_net("inplace").float(), make_data(IMAGE)
    expected = extract(model, data, kind)
    with torch.no_grad():
        assert are_equal(extract(model, data, kind), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(data.tensors[0].float()).dtype == torch.bfloat16
        assert are_equal(extract(model, data, kind), expected)


@pytest.mark.parametrize("kind", EXTRACTED)
def test_the_model_is_seen_in_eval_mode(kind):
    model, data = _prepared_model(), make_data(IMAGE)
    expected = extract(copy.deepcopy(model).eval(), data, kind)
    assert are_equal(extract(model.train(), data, kind), expected)


@pytest.mark.parametrize("kind", EXTRACTED)
def test_training_goes_on_as_if_nothing_had_happened(kind):
    model = _prepared_model()
    twin = copy.deepcopy(model)
    extract(model, make_data(IMAGE), kind)
    x, y = make_data(IMAGE).tensors
    for net in (model, twin):
        net.zero_grad()
        F.cross_entropy(net(x.float()), y).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
        assert not {"sum_grad_squared", "grad_batch"} & set(p.__dict__)


@pytest.mark.parametrize("kind", EXTRACTED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_are_extracted_in_float32(kind, dtype):
    model, data = build_net("lenet").to(dtype), make_data(IMAGE)
    extracted = extract(model, data, kind)
    assert all(p.dtype == dtype for p in model.parameters())
    for block in extracted.blocks.values():
        assert all(tensor.dtype == torch.float32 for tensor in block.tensors().values())
    assert are_equal(extracted, extract(copy.deepcopy(model).float(), data, kind))


@pytest.mark.parametrize("kind", EXTRACTED)
def test_blocks_hold_no_graph(kind):
    extracted = extract(build_net("lenet"), make_data(IMAGE), kind)
    for block in extracted.blocks.values():
        assert not any(tensor.requires_grad for tensor in block.tensors().values())


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal", "input_gram"])
def test_nothing_of_an_extraction_waits_for_the_garbage_collector(kind, monkeypatch):
    copies, original = [], data_pass.copy_model

    def copying(*arguments):
        copied = original(*arguments)
        copies.append(weakref.ref(copied))
        return copied

    monkeypatch.setattr(data_pass, "copy_model", copying)
    gc.collect()
    gc.disable()
    try:
        found = extract(build_net("lenet"), make_data(IMAGE), kind)
        blocks = found.blocks.values()
        factors = [weakref.ref(t) for block in blocks for t in block.tensors().values()]
        assert all(factor() is not None for factor in factors)
        del found, blocks
        assert [factor() for factor in factors] == [None] * len(factors)
        assert [copied() for copied in copies] == [None]
    finally:
        gc.enable()
