"""What every likelihood can do: score logits, and give the residuals that a Fisher is made of."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

IGNORE_INDEX = -100
"""Label of what is not observed, as in `torch.nn.functional.cross_entropy`."""


class Likelihood(ABC):
    """The distribution of the labels of a batch, given the model's logits.

    A sample holds one or more *observations*, which are independent given its logits: the positions
    of a categorical likelihood (tokens, pixels), or the outputs of the others.

    The class itself scores a model (`nll`, `accuracy`). An instance stands for one batch, and gives
    the residuals of its labels (label minus mean) of which a Fisher information is made. Logits may
    come in half precision: whatever loses digits there is computed `exactly`.

    Attributes:
        name: Name of the likelihood, its key in `LIKELIHOODS` and in an update's header.
        softmax: Whether the logits are those of a softmax, so that adding a constant to all logits
            of an observation changes nothing.
        observations: Number of observations of each sample of the batch.

    Example:
        >>> from lightning_fedfisher.likelihoods import LIKELIHOODS
        >>> logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
        >>> LIKELIHOODS["categorical"].accuracy(logits, labels)
        tensor([1., 0.])
    """

    name: ClassVar[str]
    softmax: ClassVar[bool] = False
    observations: int
    _y: Tensor | None

    @abstractmethod
    def __init__(self, logits: Tensor, labels: Tensor | None) -> None:
        """Reads the logits and labels of a batch.

        Args:
            logits: Output of the model, of shape ``(samples, *)``, without a graph.
            labels: Labels of the batch; None if it has none, which some Fisher types allow.

        Raises:
            ValueError: If the labels cannot belong to the logits.
        """

    @staticmethod
    @abstractmethod
    def are_labels(labels: Tensor, logits: Tensor) -> bool:
        """Tells whether something has the form of labels: their shape and type, whatever is in it.

        Args:
            labels: What stands in the place of labels.
            logits: Output of the model, of shape ``(samples, *)``.
        """

    @staticmethod
    @abstractmethod
    def mark_unobserved(labels: Tensor, value: float) -> Tensor:
        """Marks labels of one value as not observed, the way this likelihood knows it.

        Args:
            labels: Labels of a batch, which are not changed.
            value: The label that stands for none, such as 255 for a pixel that belongs to nothing.

        Returns:
            Labels of the same shape.
        """

    @staticmethod
    @abstractmethod
    def nll(logits: Tensor, labels: Tensor) -> Tensor:
        """Negative log-likelihood of each sample, in nats, summed over its observations.

        Args:
            logits: Output of the model, of shape ``(samples, *)``.
            labels: Labels of the same samples.

        Returns:
            A tensor of shape ``(samples,)``.

        Raises:
            ValueError: If the labels cannot belong to the logits.
        """

    @staticmethod
    @abstractmethod
    def accuracy(logits: Tensor, labels: Tensor) -> Tensor | None:
        """Share of each sample's observations that the model predicts correctly.

        Args:
            logits: Output of the model, of shape ``(samples, *)``.
            labels: Labels of the same samples.

        Returns:
            A tensor of shape ``(samples,)`` of values from 0 to 1, NaN for a sample without an
            observed label; None if labels of this likelihood are not right or wrong.

        Raises:
            ValueError: If the labels cannot belong to the logits.
        """

    @classmethod
    @abstractmethod
    def regressands(cls, logits: Tensor, labels: Tensor) -> Tensor:
        """What a least-squares fit of the labels brings the outputs close to.

        Args:
            logits: Output of the model, of shape ``(samples, *)``; its values do not matter.
            labels: Labels of the same samples.

        Returns:
            A tensor in float64 of shape ``(samples, *positions, outputs)``: an observation in each
            row, and NaN where it is not observed.

        Raises:
            ValueError: If the labels cannot belong to the logits.
        """

    @classmethod
    def check_logits(cls, logits: Tensor) -> None:
        """Refuses an output that cannot hold logits of this likelihood.

        Args:
            logits: Output of the model.

        Raises:
            ValueError: If there are no samples, or a logit is not finite.
        """
        if logits.ndim < 1 or logits.numel() == 0:
            raise ValueError("a batch holds no samples: leave it out")
        if not torch.stack(logits.aminmax()).isfinite().all():  # one pass, where NaN wins
            raise ValueError(
                "the model's logits are not finite: it has diverged, or a batch holds NaN"
            )

    @abstractmethod
    def residual(self) -> Tensor:
        """Label minus mean, of the logits' shape."""

    @abstractmethod
    def unit_residual(self) -> Tensor:
        """The residual with that of every observation scaled to length 1, of the logits' shape."""

    @abstractmethod
    def drawn_residual(self, uniforms: Tensor) -> Tensor:
        """Label minus mean for labels drawn from the model, of the logits' shape.

        Args:
            uniforms: One uniform draw from [0, 1) for each observation, of shape
                ``(samples, observations)``.
        """

    @abstractmethod
    def signed(self, residual: Tensor, signs: Tensor) -> Tensor:
        """Multiplies the residual of every observation by a sign, or a number, of its own.

        Args:
            residual: A residual of the logits' shape.
            signs: A number for each, of shape ``(samples, observations)``.
        """

    @abstractmethod
    def parts(self) -> Tensor:
        """Squared lengths of the terms that sum to the labels' covariance, such as ``p (1 - p)``.

        Returns:
            A tensor of shape ``(samples, parts)``.
        """

    def drawn_parts(self, uniforms: Tensor) -> Tensor | None:
        """Like `parts`, with the frequencies of drawn labels in place of their probabilities.

        From then on `part` gives the directions of these draws.

        Args:
            uniforms: Uniform draws from [0, 1) of shape ``(samples, draws)``, all of them for the
                only observation of a sample.

        Returns:
            A tensor of shape ``(samples, parts)``; None where equal draws are so rare that every
            draw is a direction of its own.
        """
        return None

    @abstractmethod
    def part(self, rows: Tensor, parts: Tensor) -> Tensor:
        """The directions that `parts` gives the squared lengths of.

        Args:
            rows: Index of a sample for each direction wanted.
            parts: Index of the direction among those of its sample, of the same length.

        Returns:
            A tensor of shape ``(len(rows), *logits.shape[1:])``.
        """

    def _labels(self) -> Tensor:
        if self._y is None:
            raise ValueError(
                "this Fisher type needs labels, and there are none: have forward= return (logits, "
                'labels), or pass fisher="mc", which draws them'
            )
        return self._y


class ScalarLikelihood(Likelihood):
    """Base of likelihoods in which every logit is an observation with one label of its own.

    A label that is NaN is not observed: it has no residual and no variance.
    """

    def __init__(self, logits: Tensor, labels: Tensor | None) -> None:
        """Reads the logits and labels of a batch.

        Args:
            logits: Output of the model, of shape ``(samples, *outputs)``.
            labels: Labels of the logits' shape; None if the batch has none.

        Raises:
            ValueError: If the labels cannot belong to the logits.
        """
        self._logits = exactly(logits)
        self._observed = torch.ones_like(self._logits)
        self._y = None
        if labels is not None:
            y = self.check_labels(labels, self._logits)
            self._observed = (~y.isnan()).to(y)
            self._y = y.nan_to_num(0.0)
        self.observations = math.prod(logits.shape[1:])

    @override
    @staticmethod
    def are_labels(labels: Tensor, logits: Tensor) -> bool:
        real = not labels.is_complex()
        return real and _without_ones(labels) == _without_ones(logits)

    @override
    @staticmethod
    def mark_unobserved(labels: Tensor, value: float) -> Tensor:
        return exactly(labels).masked_fill(labels == value, torch.nan)

    @classmethod
    def check_labels(cls, labels: Tensor, logits: Tensor) -> Tensor:
        """Refuses labels that cannot belong to the logits.

        Args:
            labels: Labels of a batch.
            logits: Logits of the same batch.

        Returns:
            The labels in the logits' dtype and shape, NaN where they are not observed.

        Raises:
            ValueError: If the shapes differ in more than dimensions of size 1, or a label is
                infinite.
        """
        if not cls.are_labels(labels, logits):
            raise ValueError(
                f"labels must have the logits' shape {tuple(logits.shape)}, got "
                f"{tuple(labels.shape)}: pass forward= to return logits and labels of one shape"
            )
        if labels.isinf().any():
            raise ValueError("labels must be finite, or NaN where they are not observed")
        return labels.reshape(logits.shape).to(logits)

    @override
    @classmethod
    def regressands(cls, logits: Tensor, labels: Tensor) -> Tensor:
        return exactly(cls.check_labels(labels, logits))

    @abstractmethod
    def _variance(self) -> Tensor:
        """Variance of each label given its logit, of the logits' shape."""

    @override
    def unit_residual(self) -> Tensor:
        return self._observed

    @override
    def signed(self, residual: Tensor, signs: Tensor) -> Tensor:
        return residual * signs.view_as(residual)

    @override
    def parts(self) -> Tensor:
        return (self._variance() * self._observed).reshape(len(self._logits), -1)

    @override
    def part(self, rows: Tensor, parts: Tensor) -> Tensor:
        variance = self.parts()
        whole = variance.new_zeros(len(rows), variance.shape[1])
        whole[torch.arange(len(rows), device=rows.device), parts] = variance[rows, parts].sqrt()
        result: Tensor = whole.reshape(len(rows), *self._logits.shape[1:])
        return result


def exactly(tensor: Tensor) -> Tensor:
    """Gives a tensor in float64.

    The residual of a sample that the model is certain of is far below the resolution of float32.

    Args:
        tensor: Numbers of any floating type.

    Returns:
        The same in float64, or in float32 on Apple's GPUs, which have no float64.
    """
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def sum_over_observations(values: Tensor) -> Tensor:
    """Adds up the values of each sample.

    Args:
        values: A tensor of shape ``(samples, *)``.

    Returns:
        A tensor of shape ``(samples,)``.
    """
    return values.reshape(len(values), -1).sum(dim=1)


def mean_over_observed(values: Tensor) -> Tensor:
    """Takes the mean of each sample's values, of those that are not NaN.

    Args:
        values: A tensor of shape ``(samples, *)``.

    Returns:
        A tensor of shape ``(samples,)``, NaN where none is observed.
    """
    return values.reshape(len(values), -1).nanmean(dim=1)


def _without_ones(tensor: Tensor) -> list[int]:
    """The number of samples, and the dimensions of a sample that have more than one entry."""
    return [*tensor.shape[:1], *(size for size in tensor.shape[1:] if size != 1)]
