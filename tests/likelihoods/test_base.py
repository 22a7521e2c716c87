"""What the base classes promise."""

import pytest
import torch

from lightning_fedfisher.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from lightning_fedfisher.likelihoods.base import sum_over_observations


def test_a_likelihood_cannot_be_used_unfinished():
    with pytest.raises(TypeError, match="abstract"):
        Likelihood(torch.zeros(2, 3), None)


@pytest.mark.parametrize("likelihood", [Categorical, Bernoulli, Gaussian])
def test_residuals_of_missing_labels_are_an_error(likelihood):
    if likelihood is not Gaussian:
        assert likelihood(torch.zeros(2, 3), None).observations in (1, 3)
    with pytest.raises(ValueError, match="needs labels"):
        likelihood(torch.zeros(2, 3), None).residual()


def test_equal_draws_are_counted_for_classes_only():
    uniforms = torch.rand(2, 5, dtype=torch.float64)
    assert Categorical(torch.zeros(2, 3).double(), None).drawn_parts(uniforms).shape == (2, 3)
    for likelihood in (Bernoulli, Gaussian):
        assert likelihood(torch.zeros(2, 1).double(), None).drawn_parts(uniforms) is None


def test_sums_of_samples_with_and_without_observations_behind():
    assert sum_over_observations(torch.ones(3)).tolist() == [1, 1, 1]
    assert sum_over_observations(torch.ones(3, 2, 2)).tolist() == [4, 4, 4]


@pytest.mark.parametrize("likelihood", [Bernoulli, Gaussian])
def test_least_squares_regresses_on_the_labels_of_scalars(likelihood):
    labels = torch.rand(4, 2)
    found = likelihood.regressands(torch.randn(4, 2), labels)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), labels, rtol=0, atol=0)
    with pytest.raises(ValueError, match="the logits' shape"):
        likelihood.regressands(torch.randn(4), labels)
