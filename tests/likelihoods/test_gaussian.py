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
