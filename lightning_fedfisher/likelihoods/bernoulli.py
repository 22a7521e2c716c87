"""Binary and multi-label classification: every output is true or false."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from lightning_fedfisher.likelihoods.base import ScalarLikelihood, sum_over_observations


class Bernoulli(ScalarLikelihood):
    """Every logit is the log-odds that its label is 1 and not 0.

    Logits and labels have the same shape, ``(samples, *outputs)``. A label may be any number from 0
    to 1, as with label smoothing.

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
        if not ((y >= 0) & (y <= 1)).all():
            raise ValueError("labels of a Bernoulli likelihood must lie in [0, 1]")
        return y

    @override
    @staticmethod
    def nll(logits: Tensor, labels: Tensor) -> Tensor:
        y = Bernoulli.check_labels(labels, logits)
        return sum_over_observations(
            functional.binary_cross_entropy_with_logits(logits, y, reduction="none")
        )

    @override
    @staticmethod
    def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
        y = Bernoulli.check_labels(labels, logits)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return ((logits > 0) == y).to(dtype).reshape(len(logits), -1).mean(dim=1)

    @override
    def residual(self) -> Tensor:
        # y (1 - p) - (1 - y) p, which loses no digits where p is near its label.
        y = self._labels()
        return y * torch.sigmoid(-self._logits) - (1 - y) * torch.sigmoid(self._logits)

    @override
    def drawn_residual(self, uniforms: Tensor) -> Tensor:
        p = torch.sigmoid(self._logits)
        return torch.where(uniforms.view_as(p) < p, torch.sigmoid(-self._logits), -p)

    @override
    def _variance(self) -> Tensor:
        return torch.sigmoid(self._logits) * torch.sigmoid(-self._logits)
