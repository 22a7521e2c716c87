"""Copies of modules with anything in them."""

import functools
import gc
import queue
import tempfile
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm

from lightning_fedfisher import UnsupportedModelError, extract_curvature
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
    before = copied(X)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1.0)
    assert not torch.allclose(copied(X), before)
    torch.testing.assert_close(model(X), before)


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


def test_a_module_that_cannot_be_copied_is_never_shared():
    class Stubborn(nn.Linear):
        def __getstate__(self):
            raise TypeError("not me")

    model = nn.Sequential(Stubborn(4, 5), nn.Linear(5, 3))
    model(X).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(TypeError, match="not me") as caught:
        extract_curvature(model, [(X, torch.tensor([0, 1, 2]))], progress=False)
    assert "Stubborn cannot be copied" in caught.value.__notes__[0]
    assert model.training
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    assert all(p.requires_grad for p in model.parameters())


def test_hooks_of_a_copy_write_to_what_its_forward_pass_reads():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
            acts = self.acts = {}
            self.body.register_forward_hook(lambda module, args, out: acts.update(last=out))

        def forward(self, x):
            self.body(x)
            return self.head(self.acts["last"].tanh())

    model = Kept()
    model(X)
    kept = model.acts["last"]
    copied = deep_copy(model)
    nn.init.zeros_(copied.body.weight)
    nn.init.zeros_(copied.body.bias)
    torch.testing.assert_close(copied(X), copied.head.bias.expand(3, 3))
    assert model.acts["last"] is kept


@pytest.mark.parametrize("way", ["closure", "default", "partial", "method"])
def test_functions_set_on_an_instance_run_the_parts_of_the_copy(way):
    model = nn.Sequential(nn.Linear(4, 3))
    layer, old = model[0], model[0].forward
    model[0].forward = {
        "closure": lambda x: 2 * old(x),
        "default": lambda x, inner=layer: 2 * nn.functional.linear(x, inner.weight, inner.bias),
        "partial": functools.partial(lambda inner, x: 2 * inner(x), old),
        "method": old,
    }[way]
    copied = deep_copy(model)
    assert torch.equal(copied(X), model(X))
    nn.init.zeros_(copied[0].weight)
    nn.init.zeros_(copied[0].bias)
    assert not copied(X).any()
    assert model(X).any()


def test_what_does_something_when_it_is_deleted_is_shared(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3))
    model.log = tempfile.NamedTemporaryFile(dir=tmp_path)  # noqa: SIM115
    copied = deep_copy(model)
    assert copied.log is model.log
    del copied
    gc.collect()
    model.log.write(b"still open")
    assert list(tmp_path.iterdir())
    model.log.close()


def test_a_forward_pass_of_the_original_is_refused_and_not_taken_for_one_without_gradients():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 3)})
    apart = _Holder(None, lambda x, body=model["body"]: body(x))

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            return self.parts["head"](apart.nested[0]["part"](x))

    with pytest.raises(UnsupportedModelError, match="not the copy's own"):
        extract_curvature(Tied(), [(X, torch.tensor([0, 1, 2]))], progress=False)
