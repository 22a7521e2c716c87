"""Binary and multi-label classification: every output is true or false."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from lightning_fedfisher.likelihoods.base import (
    IGNORE_INDEX,
    ScalarLikelihood,
    mean_over_observed,
    sum_over_observations,
)


class Bernoulli(ScalarLikelihood):
    """Every logit is the log-odds that its label is 1 and not 0.

    Logits and labels have the same shape, ``(samples, *outputs)``, up to dimensions of size 1. A
    label may be any number from 0 to 1, as with label smoothing. One that is NaN or -100 is not
    observed.

    Example:
        >>> logits = torch.tensor([[0.0, 3.0], [-3.0, 3.0]])
        >>> labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> Bernoulli.nll(logits, labels)
        tensor([3.7417, 0.0972])
        >>> Bernoulli.accuracy(logits, labels)
        tensor([0., 1.])
    """

    name: ClassVar[str] = "bernoulli"

    @override
    @classmethod
    def check_labels(cls, labels: Tensor, logits: Tensor) -> Tensor:
        y = super().check_labels(labels, logits)
        y = y.masked_fill(y == IGNORE_INDEX, torch.nan)
        if ((y < 0) | (y > 1)).any():
            raise ValueError(
                "labels of a Bernoulli likelihood must lie in [0, 1], got "
                f"{y[(y < 0) | (y > 1)][0].item():g}: pass ignore_index=, or forward= to label "
                f"{IGNORE_INDEX} what is not observed"
            )
        return y

    @override
    @staticmethod
    def nll(logits: Tensor, labels: Tensor) -> Tensor:
        y = Bernoulli.check_labels(labels, logits)
        lost = functional.binary_cross_entropy_with_logits(logits, y, reduction="none")
        return sum_over_observations(lost.masked_fill(y.isnan(), 0.0))

    @override
    @staticmethod
    def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
        y = Bernoulli.check_labels(labels, logits)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return mean_over_observed(((logits > 0) == y).to(dtype).masked_fill(y.isnan(), torch.nan))

    @override
    def residual(self) -> Tensor:
        # y (1 - p) - (1 - y) p, which loses no digits where p is near its label.
        y = self._labels()
        residual = y * torch.sigmoid(-self._logits) - (1 - y) * torch.sigmoid(self._logits)
        return residual * self._observed

    @override
    def drawn_residual(self, uniforms: Tensor) -> Tensor:
        p = torch.sigmoid(self._logits)
        drawn = torch.where(uniforms.view_as(p) < p, torch.sigmoid(-self._logits), -p)
        return drawn * self._observed

    @override
    def _variance(self) -> Tensor:
        return torch.sigmoid(self._logits) * torch.sigmoid(-self._logits)
