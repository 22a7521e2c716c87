"""One set of options: its defaults, what it refuses, and that every entrance takes it."""

import dataclasses
import inspect
import typing

import numpy as np
import pytest
import torch
from torch import nn

from lightning_fedfisher.callback import FedFisherCallback
from lightning_fedfisher.errors import FedFisherError
from lightning_fedfisher.extraction import ExtractionOptions, extract_curvature, extract_curvatures
from lightning_fedfisher.extraction.options import OptionOverrides

FIELDS = {field.name: field for field in dataclasses.fields(ExtractionOptions)}
BATCHES = [(torch.eye(4)[:, :3], torch.tensor([0, 1, 0, 1]))]


def _model():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def test_options_are_frozen_and_comparable():
    options = ExtractionOptions(seed=3)
    assert options == dataclasses.replace(ExtractionOptions(), seed=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.seed = 4


def test_overrides_are_the_fields_of_the_options():
    overrides = typing.get_type_hints(OptionOverrides)
    hints = typing.get_type_hints(ExtractionOptions)
    assert overrides == {name: hint for name, hint in hints.items() if name != "curvature"}


def test_the_callback_has_the_defaults_of_the_options():
    parameters = inspect.signature(FedFisherCallback).parameters
    assert FIELDS.keys() - parameters.keys() == {"tolerance"}
    for name, field in FIELDS.items():
        if name in parameters and name != "estimate_statistics":
            assert parameters[name].default == field.default, name
    # A callback sees the mode in which a model was trained; whoever calls a function chose a mode.
    assert FedFisherCallback()._client.options == ExtractionOptions(estimate_statistics=True)
    with pytest.raises(FedFisherError, match="estimate_statistics must be True or False"):
        FedFisherCallback(estimate_statistics="no")


def test_all_that_is_wrong_is_named_at_once():
    with pytest.raises(FedFisherError, match="curvature='hessian'") as caught:
        ExtractionOptions(
            curvature="hessian",
            fisher="fish",
            likelihood="poisson",
            max_samples=0,
            batch_size=0,
            positions=0,
            draws=0,
            tolerance=1.0,
            estimate_statistics="no",
            ignore_index="void",
        )
    for name in FIELDS.keys() - {"seed", "forward"}:
        assert name in str(caught.value)
    assert len(caught.value.offenders) == len(FIELDS) - 2


@pytest.mark.parametrize("value", [0, -1, 2.0, "8"])
@pytest.mark.parametrize("name", ["batch_size", "draws"])
def test_counts_are_whole_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, a whole number"):
        ExtractionOptions(**{name: value})


def test_options_may_be_given_whole_and_changed_by_name():
    options = ExtractionOptions(curvature="diagonal", fisher="exact", tolerance=0.0)
    whole = extract_curvature(_model(), BATCHES, options=options)
    by_name = extract_curvature(_model(), BATCHES, "diagonal", fisher="exact", tolerance=0.0)
    assert whole.options == by_name.options == options
    assert whole.kind == "diagonal"
    assert torch.equal(whole.blocks["weight"].values, by_name.blocks["weight"].values)
    changed = extract_curvature(_model(), BATCHES, "dense", options, fisher="empirical")
    assert changed.options == dataclasses.replace(options, curvature="dense", fisher="empirical")


def test_each_result_has_the_options_of_its_own_kind():
    found = extract_curvatures(_model(), BATCHES, ("identity", "kfac", "dense"), draws=2)
    assert {kind: result.options.curvature for kind, result in found.items()} == {
        kind: kind for kind in ("identity", "kfac", "dense")
    }
    assert {result.options.draws for result in found.values()} == {2}
    assert found["identity"].header(4).fisher == ""
    assert found["kfac"].header(4).fisher == "normalised"


def test_an_option_that_does_not_exist_is_refused():
    with pytest.raises(TypeError, match="tolerence"):
        extract_curvature(_model(), BATCHES, tolerence=0.1)


def test_whole_numbers_of_numpy_are_whole_numbers():
    options = ExtractionOptions(batch_size=np.int64(3), draws=np.int32(1), max_samples=np.int64(4))
    assert extract_curvature(_model(), BATCHES, options=options).num_samples == 4
