"""Refusals: one family, one message, and each reason in a line of its own."""

import pickle

import pytest

import lightning_fedfisher
from lightning_fedfisher import errors
from lightning_fedfisher.errors import (
    BudgetError,
    FedFisherError,
    MergeError,
    UnsupportedModelError,
    UpdateError,
)

REASONS = ["first is odd: leave it out", "second is missing"]
KINDS = [
    (FedFisherError("Refused:", REASONS), "Refused:"),
    (
        UnsupportedModelError(REASONS),
        "The curvature of this model cannot be extracted as asked:",
    ),
    (UpdateError("a.safetensors", REASONS), "a.safetensors is not a usable client update:"),
    (MergeError(REASONS), "These updates cannot be merged:"),
]


@pytest.mark.parametrize(("error", "heading"), KINDS, ids=lambda value: type(value).__name__)
def test_a_message_has_a_heading_and_a_line_for_each_reason(error, heading):
    assert str(error).splitlines() == [heading, *(f"  - {reason}" for reason in REASONS)]
    assert error.offenders == tuple(REASONS)


def test_a_budget_is_refused_in_one_line():
    error = BudgetError("9 bytes are needed, there is room for 5: raise the budget")
    assert str(error) == "9 bytes are needed, there is room for 5: raise the budget"
    assert error.offenders == ()


def test_of_a_hostile_file_so_much_is_told_and_no_more():
    error = UpdateError("a.safetensors", [f"{index} is odd" for index in range(10**5)])
    assert len(error.offenders) == 21
    assert error.offenders[0] == "0 is odd"
    assert error.offenders[-1] == "and 99980 more"
    assert len(UpdateError("a.safetensors", REASONS * 10).offenders) == 20
    (line,) = UpdateError("a.safetensors", ["x" * 10**7]).offenders
    assert len(line) < 3000


def test_an_update_is_refused_with_its_source():
    assert UpdateError("this update", REASONS).source == "this update"


def test_offenders_are_those_of_the_time():
    reasons = list(REASONS)
    error = MergeError(reasons)
    reasons.clear()
    assert error.offenders == tuple(REASONS)


def test_all_are_public_and_caught_as_one_or_as_value_errors():
    family = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ]
    assert len(family) == 5
    for kind in family:
        assert issubclass(kind, FedFisherError)
        assert issubclass(kind, ValueError)
        assert getattr(lightning_fedfisher, kind.__name__) is kind


@pytest.mark.parametrize("error", [*(error for error, _ in KINDS), BudgetError("big")])
def test_an_error_comes_back_from_another_process(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)
