"""Labels that are real numbers."""

import math

import pytest
import torch

from lightning_fedfisher.likelihoods import Gaussian


def test_a_perfect_prediction_has_the_nll_of_unit_variance():
    outputs = torch.randn(4, 3, dtype=torch.float64)
    expected = torch.full((4,), 1.5 * math.log(2 * math.pi), dtype=torch.float64)
    torch.testing.assert_close(Gaussian.nll(outputs, outputs), expected, rtol=0, atol=1e-14)


def test_labels_are_never_spread_over_the_outputs():
    for labels in (torch.zeros(4), torch.zeros(1, 3), torch.zeros(4, 1)):
        with pytest.raises(ValueError, match="logits' shape"):
            Gaussian.nll(torch.zeros(4, 3), labels)


def test_labels_that_are_not_finite():
    with pytest.raises(ValueError, match="finite"):
        Gaussian.nll(torch.zeros(2), torch.tensor([0.0, math.inf]))


def test_what_is_not_observed_has_no_part_in_anything():
    outputs = torch.tensor([[1.0, 5.0]], dtype=torch.float64)
    found = Gaussian(outputs, torch.tensor([[3.0, math.nan]]))
    assert found.residual().tolist() == [[2.0, 0.0]]
    assert found.parts().tolist() == [[1.0, 0.0]]
    assert found.drawn_residual(torch.full((1, 2), 0.9).double())[0, 1] == 0
    alone = Gaussian.nll(outputs[:, :1], torch.tensor([[3.0]]))
    assert torch.equal(Gaussian.nll(outputs, torch.tensor([[3.0, math.nan]])), alone)
    # A model that has diverged is not taken for one without labels.
    assert Gaussian.nll(torch.tensor([[math.nan]]), torch.tensor([[1.0]])).isnan()
