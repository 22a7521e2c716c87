"""Frozen parameters, and those that change all the same."""

import torch
from torch import nn

from lightning_fedfisher.update.frozen import frozen_digests, with_changed_ones_trained


def _model():
    torch.manual_seed(0)
    model = nn.ModuleDict({"student": nn.Linear(2, 2), "teacher": nn.Linear(2, 2)})
    model["teacher"].requires_grad_(False)
    return model


def test_nothing_that_stays_is_trained():
    model = _model()
    before = frozen_digests(model)
    assert before.keys() == {"teacher.weight", "teacher.bias"}
    found, changed = with_changed_ones_trained(model, before)
    assert found is model
    assert changed == ()


def test_what_changed_counts_as_trained_and_the_module_is_as_it_was():
    model = _model()
    before = frozen_digests(model)
    model["teacher"].weight.data.add_(1e-3)
    model["student"].weight.data.add_(1.0)
    found, changed = with_changed_ones_trained(model, before)
    assert changed == ("teacher.weight",)
    assert [n for n, p in found.named_parameters() if not p.requires_grad] == ["teacher.bias"]
    assert found["teacher"].weight.data_ptr() == model["teacher"].weight.data_ptr()
    assert not model["teacher"].weight.requires_grad


def test_a_compiled_module_is_compared_under_its_own_names():
    model = _model()
    before = frozen_digests(model)
    model["teacher"] = torch.compile(model["teacher"], backend="eager")
    assert frozen_digests(model) == before
