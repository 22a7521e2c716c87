"""Regression: every output is the mean of a normal distribution of variance 1."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.likelihoods.base import ScalarLikelihood, sum_over_observations


class Gaussian(ScalarLikelihood):
    """Every output of the model is the mean of a label of variance 1.

    Outputs and labels have the same shape, ``(samples, *outputs)``, up to dimensions of size 1. A
    label that is NaN is not observed. The negative log-likelihood is
    half the squared error, plus ``log(2 pi) / 2`` for each output. There is no accuracy.

    Example:
        >>> outputs, labels = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [3.0]])
        >>> Gaussian.nll(outputs, labels)
        tensor([0.9189, 2.9189])
        >>> Gaussian.accuracy(outputs, labels) is None
        True
    """

    name: ClassVar[str] = "gaussian"

    @override
    @staticmethod
    def nll(logits: Tensor, labels: Tensor) -> Tensor:
        y = Gaussian.check_labels(labels, logits)
        lost = ((y - logits).square() + math.log(2 * math.pi)) / 2
        return sum_over_observations(lost.masked_fill(y.isnan(), 0.0))

    @override
    @staticmethod
    def accuracy(logits: Tensor, labels: Tensor) -> None:
        return None

    @override
    def residual(self) -> Tensor:
        return (self._labels() - self._logits) * self._observed

    @override
    def drawn_residual(self, uniforms: Tensor) -> Tensor:
        tiny = torch.finfo(uniforms.dtype).tiny
        normal: Tensor = torch.special.ndtri(uniforms.clamp_min(tiny))
        return normal.view_as(self._logits) * self._observed

    @override
    def _variance(self) -> Tensor:
        return torch.ones_like(self._logits)
