"""What a model's logits say about the labels: one class for each likelihood.

To add one, write a `Likelihood` in a file of its own and add it to `LIKELIHOODS` in `registry`.
May import: nothing of this package.
"""

from lightning_fedfisher.likelihoods.base import IGNORE_INDEX, Likelihood
from lightning_fedfisher.likelihoods.bernoulli import Bernoulli
from lightning_fedfisher.likelihoods.categorical import Categorical
from lightning_fedfisher.likelihoods.gaussian import Gaussian
from lightning_fedfisher.likelihoods.registry import LIKELIHOODS

__all__ = [
    "IGNORE_INDEX",
    "LIKELIHOODS",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "Likelihood",
]
