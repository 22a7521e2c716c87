"""A copy of a model with other weights: the model itself is left alone."""

import torch
from torch import nn

from lightning_fedfisher.merge.loaded_model import loaded_copy, to_device

CPU = torch.device("cpu")


def test_a_copy_has_the_weights_and_the_model_keeps_its_own():
    model = nn.Linear(2, 1).double()
    before = model.weight.clone()
    copied = loaded_copy(model, {"weight": torch.ones(1, 2)}, CPU)
    assert torch.equal(copied.weight, torch.ones(1, 2).double())
    assert torch.equal(copied.bias, model.bias)  # what is missing stays the model's
    assert torch.equal(model.weight, before)
    assert model.training
    assert not copied.training


def test_tensors_are_moved_out_of_every_form_of_batch():
    batch = [torch.ones(1), (torch.ones(2), "text"), {"y": torch.ones(3)}]
    x, (z, text), mapping = to_device(batch, torch.device("meta"))
    assert x.is_meta
    assert z.is_meta
    assert mapping["y"].is_meta
    assert text == "text"
