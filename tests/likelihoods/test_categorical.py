"""Class labels: positions that are not observed, and logits that no classifier has."""

import pytest
import torch
from torch.nn import functional as F

from lightning_fedfisher.likelihoods import IGNORE_INDEX, Categorical


def _batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (4, 5), generator=generator)
    labels[0, 2:] = labels[2] = IGNORE_INDEX
    return logits, labels


def test_what_is_not_observed_has_no_part_in_the_nll():
    logits, labels = _batch()
    found = Categorical.nll(logits, labels)
    for i, value in enumerate(found):
        expected = F.cross_entropy(logits[i : i + 1], labels[i : i + 1], reduction="sum")
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    assert found[2] == 0


def test_what_is_not_observed_has_no_part_in_the_accuracy():
    logits, labels = _batch()
    found = Categorical.accuracy(logits, labels)
    right = logits.argmax(1) == labels
    assert found[0] == right[0, :2].double().mean()
    assert found[1] == right[1].double().mean()
    assert found[2].isnan()  # nothing of it is observed


def test_labels_of_any_integer_type():
    logits, labels = _batch()
    expected = Categorical.nll(logits, labels)
    for dtype in (torch.int16, torch.int32):
        assert torch.equal(Categorical.nll(logits, labels.to(dtype)), expected)


@pytest.mark.parametrize("logits", [torch.zeros(6), torch.zeros(6, 1)])
def test_logits_without_classes(logits):
    with pytest.raises(ValueError, match="at least 2 classes"):
        Categorical.check_logits(logits)


def test_labels_out_of_range():
    logits, labels = _batch()
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=r"lie in \[0, 3\)"):
            Categorical.nll(logits, torch.full_like(labels, wrong))
    with pytest.raises(ValueError, match="class indices"):
        Categorical.accuracy(logits, labels + 0.5)


@pytest.mark.parametrize("form", ["column", "float", "NaN"])
def test_labels_of_another_form_say_the_same(form):
    logits, labels = _batch()
    given = labels.unsqueeze(1) if form == "column" else labels.double()
    if form == "NaN":
        given = given.masked_fill(labels == IGNORE_INDEX, torch.nan)
    expected = Categorical(logits, labels)
    assert torch.equal(Categorical(logits, given).residual(), expected.residual())
    assert torch.equal(Categorical(logits, given).parts(), expected.parts())
    if form != "column":
        marked = Categorical.mark_unobserved(given, 1)
        assert torch.equal(
            Categorical(logits, marked).residual(),
            Categorical(logits, labels.masked_fill(labels == 1, IGNORE_INDEX)).residual(),
        )


def test_least_squares_regresses_on_ones_and_zeros():
    labels = torch.tensor([[0, -100], [2, 1]])
    found = Categorical.regressands(torch.randn(2, 3, 2), labels)
    assert (found.shape, found.dtype) == ((2, 2, 3), torch.float64)
    assert found[0, 1].isnan().all()
    assert found[0, 0].tolist() == [1, 0, 0]
    assert found[1].tolist() == [[0, 0, 1], [0, 1, 0]]
    with pytest.raises(ValueError, match="labels must"):
        Categorical.regressands(torch.randn(2, 3), torch.tensor([0, 3]))


def test_a_class_that_cannot_be_is_one_of_very_small_probability():
    logits, labels = _batch()
    masked, small = logits.clone(), logits.clone()
    masked[:, 1], small[:, 1] = -torch.inf, -1e9
    labels[labels == 1] = 0
    Categorical.check_logits(masked)
    draws = torch.rand(4, 5, dtype=torch.float64)
    found, expected = Categorical(masked, labels), Categorical(small, labels)
    for method in ("residual", "unit_residual", "parts"):
        torch.testing.assert_close(getattr(found, method)(), getattr(expected, method)())
    torch.testing.assert_close(found.drawn_residual(draws), expected.drawn_residual(draws))
    torch.testing.assert_close(Categorical.nll(masked, labels), Categorical.nll(small, labels))


def test_where_one_class_alone_can_be_nothing_is_left_to_learn():
    logits = torch.tensor([[2.0, -torch.inf, -torch.inf]])
    found = Categorical(logits, torch.tensor([0]))
    assert not found.unit_residual().any()
    assert not found.residual().any()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_logits_that_are_no_logits(value):
    logits = torch.zeros(2, 3)
    logits[1, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        Categorical.check_logits(logits)
    with pytest.raises(ValueError, match="not finite"):
        Categorical.check_logits(torch.full((2, 3), -torch.inf))


def test_what_is_not_the_form_of_labels_is_told_the_way_out():
    with pytest.raises(ValueError, match=r"forward=.*dataloader="):
        Categorical.nll(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"ignore_index=.*-100"):
        Categorical.nll(torch.zeros(2, 3), torch.tensor([0, 255]))
