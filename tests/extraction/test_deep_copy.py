"""Copies of modules with anything in them."""

import queue
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm

from lightning_fedfisher.extraction.deep_copy import deep_copy

X = torch.randn(3, 4)


def _no_parameter_is_shared(model, copied):
    own = {id(p) for p in model.parameters()}
    return own.isdisjoint(id(p) for p in copied.parameters())


class _Holder:
    def __init__(self, model, part):
        self.nested = [{"part": part}, model]


@pytest.mark.parametrize(
    "make",
    [threading.Lock, queue.SimpleQueue, lambda: iter([1]), lambda: (i for i in range(2))],
    ids=["lock", "queue", "iterator", "generator"],
)
@pytest.mark.parametrize("nested", [False, True])
def test_what_cannot_be_copied_is_shared_and_nothing_else(make, nested):
    model, part = nn.Sequential(nn.Linear(4, 3)), make()
    model.part = _Holder(model[0], part) if nested else part
    copied = deep_copy(model)
    assert _no_parameter_is_shared(model, copied)
    assert torch.equal(copied(X), model(X))
    if nested:
        # What refers to a part of the model refers to the same part of the copy.
        assert copied.part.nested[1] is copied[0]


@pytest.mark.parametrize("where", ["attribute", "list", "nested", "object"])
def test_tensors_in_a_graph_are_copied_without_it(where):
    model = nn.Sequential(nn.Linear(4, 3))
    kept = model(X)
    model.kept = {
        "attribute": kept,
        "list": [kept],
        "nested": {"a": (kept, [kept])},
        "object": _Holder(model[0], kept),
    }[where]
    copied = deep_copy(model)
    found = copied.kept
    while not isinstance(found, torch.Tensor):
        found = found.nested[0]["part"] if isinstance(found, _Holder) else found
        found = found["a"] if isinstance(found, dict) else found
        found = found[0] if isinstance(found, list | tuple) else found
    assert torch.equal(found, kept)
    assert found.grad_fn is None
    assert kept.grad_fn is not None


@pytest.mark.parametrize(
    "reshape",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
        weight_norm,
        spectral_norm,
    ],
    ids=["pruning", "weight norm", "spectral norm"],
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_weights_that_hooks_make_anew_follow_the_parameters_of_the_copy(reshape):
    layer = reshape(nn.Linear(4, 3))
    model = nn.Sequential(layer)
    model(X).sum().backward()
    copied = deep_copy(model.eval())
    assert _no_parameter_is_shared(model, copied)
    torch.testing.assert_close(copied(X), model(X))
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
        copied[0].bias.fill_(1.0)
        if not hasattr(copied[0], "weight_v") and not hasattr(copied[0], "weight_u"):
            assert torch.equal(copied(X), torch.ones(3, 3))
    assert model(X).abs().sum() > 0


def test_a_copy_runs_its_own_code_and_not_what_was_compiled_of_the_original():
    model = nn.Sequential(nn.Linear(4, 3))
    model.compile(backend="eager")
    copied = deep_copy(model)
    nn.init.zeros_(copied[0].weight)
    nn.init.zeros_(copied[0].bias)
    assert not copied(X).any()
    assert model(X).any()


def test_an_error_that_no_part_explains_is_raised():
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo):
            raise ValueError("not me")

    with pytest.raises(ValueError, match="not me"):
        deep_copy(Stubborn(2, 2))
