"""Every likelihood by its name: add a row here for a new one."""

from __future__ import annotations

from lightning_fedfisher.likelihoods.base import Likelihood
from lightning_fedfisher.likelihoods.bernoulli import Bernoulli
from lightning_fedfisher.likelihoods.categorical import Categorical
from lightning_fedfisher.likelihoods.gaussian import Gaussian

LIKELIHOODS: dict[str, type[Likelihood]] = {
    likelihood.name: likelihood for likelihood in (Categorical, Bernoulli, Gaussian)
}
"""The class of each likelihood, by the name that options and update headers give it."""
