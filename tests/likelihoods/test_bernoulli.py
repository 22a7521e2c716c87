"""Labels that are true or false."""

import pytest
import torch
from torch.nn import functional as F

from lightning_fedfisher.likelihoods import Bernoulli


def test_soft_labels_have_a_cross_entropy():
    logits = torch.tensor([[0.3, -2.0], [4.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([[0.1, 0.9], [0.5, 1.0]], dtype=torch.float64)
    expected = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1)
    torch.testing.assert_close(Bernoulli.nll(logits, labels), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_labels_of_any_type(dtype):
    logits = torch.tensor([[0.3, -2.0], [4.0, 1.0]], dtype=torch.float64)
    labels = torch.tensor([[1, 0], [0, 1]]).to(dtype)
    assert Bernoulli.accuracy(logits, labels).tolist() == [1.0, 0.5]
    expected = Bernoulli.nll(logits, labels.double())
    assert torch.equal(Bernoulli.nll(logits, labels), expected)


def test_saturated_logits_have_a_finite_nll():
    logits = torch.tensor([[1000.0], [-1000.0]], dtype=torch.float64)
    assert Bernoulli.nll(logits, torch.tensor([[0.0], [0.0]])).tolist() == [1000.0, 0.0]


@pytest.mark.parametrize("label", [-0.1, 1.5])
def test_labels_that_are_no_probability(label):
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        Bernoulli.nll(torch.zeros(2, 1), torch.full((2, 1), label))


def test_what_is_not_observed_has_no_part_in_anything():
    logits = torch.tensor([[0.3, -2.0], [4.0, 0.5], [1.0, 1.0]], dtype=torch.float64)
    labels = torch.tensor([[1.0, torch.nan], [-100.0, 0.0], [torch.nan, -100.0]]).double()
    seen = torch.tensor([[True, False], [False, True], [False, False]])
    full = Bernoulli(logits, torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    found = Bernoulli(logits, labels)
    expected = full.residual().where(seen, 0.0)
    torch.testing.assert_close(found.residual(), expected, rtol=0, atol=0)
    torch.testing.assert_close(found.parts(), full.parts().where(seen, 0.0), rtol=0, atol=0)
    assert torch.equal(found.unit_residual(), seen.double())
    assert not found.drawn_residual(torch.full((3, 2), 0.3).double())[~seen].any()
    nll = Bernoulli.nll(logits, labels)
    assert nll[0] == -F.logsigmoid(logits[0, 0])
    assert nll[2] == 0
    assert Bernoulli.accuracy(logits, labels)[:2].tolist() == [1.0, 0.0]
    assert Bernoulli.accuracy(logits, labels)[2].isnan()


def test_one_logit_and_labels_without_its_dimension():
    logits, labels = torch.tensor([[0.3], [-2.0], [1.0]]), torch.tensor([1, 0, 0])
    for given in (labels, labels[:, None], labels.float()):
        torch.testing.assert_close(
            Bernoulli(logits, given).residual(),
            Bernoulli(logits, labels[:, None].double()).residual(),
        )
    assert Bernoulli.nll(logits[:, 0], labels[:, None]).shape == (3,)
    with pytest.raises(ValueError, match="forward="):
        Bernoulli.nll(torch.zeros(3, 2), labels)
