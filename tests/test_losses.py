"""The loss that knows the client's class frequencies."""

import pytest
import torch
from torch.nn import functional

from lightning_fedfisher import PriorCrossEntropy


def test_even_classes_give_cross_entropy():
    logits, labels = torch.randn(7, 4), torch.randint(0, 4, (7,))
    expected = functional.cross_entropy(logits, labels)
    torch.testing.assert_close(PriorCrossEntropy([5, 5, 5, 5])(logits, labels), expected)


@pytest.mark.parametrize("positions", [(), (6,), (2, 3)])
def test_it_is_that_of_the_posterior(positions):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, *positions, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (5, *positions), generator=generator)
    counts = torch.tensor([8.0, 1.0, 4.0], dtype=torch.float64)
    weights = counts.view(-1, *[1] * len(positions)) * logits.exp()
    posterior = weights / weights.sum(1, keepdim=True)
    expected = -posterior.gather(1, labels.unsqueeze(1)).log().mean()
    torch.testing.assert_close(
        PriorCrossEntropy([8, 1, 4])(logits, labels), expected, rtol=1e-6, atol=1e-6
    )


def test_a_constant_head_has_nothing_to_learn_from_frequencies():
    labels = torch.tensor([0, 0, 0, 1])
    logits = torch.zeros(4, 2, requires_grad=True)
    PriorCrossEntropy([3, 1])(logits, labels).backward()
    torch.testing.assert_close(logits.grad.sum(0), torch.zeros(2), atol=1e-7, rtol=0)


def test_a_class_that_is_absent_is_left_alone():
    logits = torch.zeros(2, 3, requires_grad=True)
    PriorCrossEntropy([50, 50, 0])(logits, torch.tensor([0, 1])).backward()
    assert logits.grad[:, 2].abs().max() < 1e-4
    assert logits.grad.isfinite().all()


def test_positions_may_be_ignored_and_nothing_is_saved():
    loss = PriorCrossEntropy(torch.tensor([1, 2]))
    logits, labels = torch.randn(2, 2, 3), torch.tensor([[0, -100, 1], [-100, 1, 1]])
    seen = labels != -100
    flat = logits.movedim(1, -1)[seen]
    torch.testing.assert_close(loss(logits, labels), loss(flat, labels[seen]))
    assert not loss.state_dict()


@pytest.mark.parametrize("counts", [[-1, 2], [float("nan"), 1], [0, 0], [[1, 2]]])
def test_what_are_no_counts_is_refused(counts):
    with pytest.raises(ValueError, match="class_counts"):
        PriorCrossEntropy(counts)


def test_low_precision_does_not_round_the_prior():
    loss, labels = PriorCrossEntropy([100_000, 1, 0]), torch.tensor([0, 1])
    logits = torch.tensor([[8.0, 1.0, 0.0], [3.0, -2.0, 5.0]])
    expected = loss(logits, labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(logits.bfloat16(), labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("counts", [[5], [1, 1, 1]])
def test_logits_of_other_classes_are_refused(counts):
    with pytest.raises(ValueError, match="classes second"):
        PriorCrossEntropy(counts)(torch.zeros(2, 4), torch.tensor([0, 1]))
