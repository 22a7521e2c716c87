"""Batches of any form: their logits and labels, and some of their samples."""

import pytest
import torch
from torch import nn

from lightning_fedfisher.errors import UnsupportedModelError
from lightning_fedfisher.extraction.batches import BatchRunner, map_samples, require_same_logits
from lightning_fedfisher.extraction.options import ExtractionOptions


def test_batches_are_moved_to_the_precision_of_the_model():
    runner = BatchRunner(None, lambda batch: {"x": batch[0], "y": batch[1], "name": "a"})
    batch = runner.prepare(nn.Linear(2, 2).double(), (torch.zeros(3, 2), torch.arange(3)))
    assert batch["x"].dtype == torch.float64
    assert batch["y"].dtype == torch.int64
    assert batch["name"] == "a"


def test_digits_are_never_dropped_on_the_way_to_the_model():
    runner = BatchRunner(None)
    time = torch.tensor([1.7e9 + 1], dtype=torch.float64)
    assert runner.prepare(nn.Linear(1, 1), (time, time))[0].dtype == torch.float64
    half = torch.zeros(1, dtype=torch.float16)
    assert runner.prepare(nn.Linear(1, 1), (half, half))[0].dtype == torch.float32
    mixed = nn.Sequential(nn.Linear(1, 1).double(), nn.Linear(1, 1))
    assert runner.prepare(mixed, (half, half))[0].dtype == torch.float16


def test_a_model_in_float64_makes_its_tensors_in_float64():
    class Grid(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 2)

        def forward(self, x):
            return self.net(x) + self.net(torch.linspace(0, 1, 3))

    x = torch.zeros(2, 3, dtype=torch.float64)
    assert BatchRunner(None).logits(Grid().double(), (x, x)).dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32


def test_a_module_without_forward_is_told_the_way_out():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 2)

    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"Steps defines no forward\(\): pass forward="):
        BatchRunner(None)(Steps(), (x, x))

    def missing(model, batch):
        raise NotImplementedError("another one")

    with pytest.raises(NotImplementedError, match="another one"):
        BatchRunner(missing)(Steps(), (x, x))


def test_labels_that_stand_for_none_are_marked():
    x, y = torch.zeros(3, 2), torch.tensor([0, 255, 1], dtype=torch.uint8)
    runner = ExtractionOptions(ignore_index=255).runner()
    assert runner(nn.Linear(2, 2), (x, y))[1].tolist() == [0, -100, 1]
    runner = ExtractionOptions(ignore_index=9, likelihood="gaussian").runner()
    marked = runner(nn.Linear(2, 2), (x, torch.tensor([[0, 9], [1, 2], [3, 4]])))[1]
    assert marked.isnan().tolist() == [[False, True], [False, False], [False, False]]


def test_labels_are_what_is_returned_and_never_guessed():
    x, y = torch.zeros(3, 2), torch.arange(3)
    linear = nn.Linear(2, 2)
    assert BatchRunner(None, None)(linear, (x, y))[1] is y
    runner = BatchRunner(lambda module, batch: module(batch["x"]), None)
    assert runner(linear, {"x": x, "target": y})[1] is None
    assert BatchRunner(lambda module, batch: module(batch[0]))(linear, (x, y))[1] is None
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


def test_logits_of_classes_that_cannot_be_are_alike_in_both():
    logits = torch.tensor([[1.0, -torch.inf], [0.5, 3.0]])
    require_same_logits(logits[:1], logits, slice(0, 1))
    for other in (-1.0, torch.inf, torch.nan):
        with pytest.raises(UnsupportedModelError, match="depend on the other samples"):
            require_same_logits(torch.tensor([[1.0, other]]), logits, slice(0, 1))
    with pytest.raises(UnsupportedModelError, match="batch_size=1"):
        require_same_logits(logits[:1] + 1e-2, logits, slice(0, 1))
