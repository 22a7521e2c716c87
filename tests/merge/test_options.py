"""Options of a merge: stated once, refused when out of range."""

import inspect
from dataclasses import fields

import pytest

from lightning_fedfisher.merge.methods import METHODS
from lightning_fedfisher.merge.options import MergeOptions
from lightning_fedfisher.merge.without_trainer import merge_updates
from lightning_fedfisher.merge_module import FisherMergeModule


@pytest.mark.parametrize("function", [merge_updates, FisherMergeModule.__init__])
def test_defaults_are_those_of_the_options(function):
    parameters = inspect.signature(function).parameters
    for field in fields(MergeOptions):
        assert parameters[field.name].default == field.default, field.name


def test_what_is_not_asked_for_is_the_methods():
    for name, method in METHODS.items():
        assert MergeOptions(name).row == method


def test_what_is_asked_for_changes_the_row():
    row = MergeOptions("fedfisher", keep_best=True, max_iterations=7, max_influence=2).row
    assert (row.keeps_best, row.max_iterations, row.max_influence) == (True, 7, 2.0)
    assert row.output_transform is METHODS["fedfisher"].output_transform


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"method": "none"}, "method 'none' is not one of"),
        ({"max_iterations": 0}, "max_iterations must be at least 1, got 0"),
        ({"max_influence": 0.99}, "max_influence must be at least 1"),
        ({"max_influence": float("nan")}, "max_influence must be at least 1"),
        ({"memory_budget": -1}, "memory_budget must be at least 0 bytes"),
    ],
)
def test_what_cannot_be_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        MergeOptions(**changes)
