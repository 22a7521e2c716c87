"""Batches of any form: their logits and labels, and some of their samples."""

import pytest
import torch
from torch import nn

from lightning_fedfisher.errors import UnsupportedModelError
from lightning_fedfisher.extraction.batches import BatchRunner, map_samples, require_same_logits


def test_batches_are_moved_to_the_precision_of_the_model():
    runner = BatchRunner(None, lambda batch: {"x": batch[0], "y": batch[1], "name": "a"})
    batch = runner.prepare(nn.Linear(2, 2).double(), (torch.zeros(3, 2), torch.arange(3)))
    assert batch["x"].dtype == torch.float64
    assert batch["y"].dtype == torch.int64
    assert batch["name"] == "a"


def test_labels_are_found_where_the_form_of_a_batch_tells():
    x, y = torch.zeros(3, 2), torch.arange(3)
    linear = nn.Linear(2, 2)
    assert BatchRunner(None, None)(linear, (x, y))[1] is y
    runner = BatchRunner(lambda module, batch: module(batch["x"]), None)
    assert runner(linear, {"x": x, "target": y})[1] is y
    assert runner(linear, {"x": x, "else": y})[1] is None
    assert runner.logits(linear, {"x": x}).shape == (3, 2)
    with_labels = BatchRunner(lambda module, batch: (module(batch), y), None)
    assert with_labels(linear, x)[1] is y


def test_only_what_runs_over_samples_is_changed():
    batch = {"x": torch.arange(6).view(3, 2), "scale": torch.ones(2), "step": torch.tensor(1)}
    found = map_samples(batch, 3, lambda tensor: tensor[:1])
    assert found["x"].tolist() == [[0, 1]]
    assert found["scale"].shape == (2,)
    assert found["step"].ndim == 0


def test_logits_may_differ_by_rounding_only():
    logits = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    require_same_logits(logits[:1] + 1e-4, logits, slice(0, 1))
    require_same_logits(logits[1:], logits, torch.tensor([1]))
    with pytest.raises(UnsupportedModelError, match="depend on the other samples"):
        require_same_logits(logits[:1] + 1e-2, logits, slice(0, 1))
    with pytest.raises(UnsupportedModelError, match="depend on the other samples"):
        require_same_logits(logits, logits, slice(0, 1))
