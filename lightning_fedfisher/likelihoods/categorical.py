"""Classification: every observation is one of several classes."""

from __future__ import annotations

import math
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from lightning_fedfisher.likelihoods.base import (
    IGNORE_INDEX,
    Likelihood,
    exactly,
    sum_over_observations,
)


class Categorical(Likelihood):
    """Classes along the logits' second dimension, one observation at each position after it.

    Logits have the shape ``(samples, classes, *positions)``, and labels are class indices of shape
    ``(samples, *positions)``. A position whose label is -100 is not observed. A class whose logit
    is ``-inf`` has the probability 0, and its logit no residual.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 50.0]])
        >>> Categorical.nll(logits, torch.tensor([0, 1]))
        tensor([0.6931, 0.0000])
        >>> Categorical(logits, torch.tensor([0, 1])).residual()
        tensor([[ 5.0000e-01, -5.0000e-01],
                [-1.9287e-22,  1.9287e-22]])
    """

    name: ClassVar[str] = "categorical"
    softmax: ClassVar[bool] = True

    def __init__(self, logits: Tensor, labels: Tensor | None) -> None:
        """Reads the logits and labels of a batch.

        Args:
            logits: Output of the model, of shape ``(samples, classes, *positions)``.
            labels: Class indices of shape ``(samples, *positions)``; None if the batch has none.

        Raises:
            ValueError: If the labels cannot belong to the logits.
        """
        self._logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self._positions = logits.shape[2:]
        self.observations = math.prod(self._positions)
        self._y: Tensor | None = None
        self._observed = self._logits.new_ones(len(logits), self.observations)
        if labels is not None:
            y = _check_classes(labels, logits).reshape(len(logits), -1)
            self._observed = (y != IGNORE_INDEX).to(self._logits)
            self._y = y.clamp_min(0)

    @cached_property
    def _log_p(self) -> Tensor:
        """Log-probabilities in float64, of shape ``(samples, observations, classes)``."""
        log_p = torch.log_softmax(exactly(self._logits), dim=1)
        return log_p.reshape(*log_p.shape[:2], -1).movedim(1, -1)

    @cached_property
    def _p(self) -> Tensor:
        """Probabilities, of the shape of the log-probabilities."""
        return self._log_p.exp()

    @cached_property
    def _weights(self) -> Tensor:
        """What each class counts for: its probability, until labels are drawn."""
        return self._p

    @override
    @staticmethod
    def are_labels(labels: Tensor, logits: Tensor) -> bool:
        expected = (logits.shape[0], *logits.shape[2:])
        fits = labels.shape in (expected, (logits.shape[0], 1, *logits.shape[2:]))
        if not fits or labels.is_complex():
            return False
        # Whole numbers of any type; those that are NaN are not observed.
        return not labels.is_floating_point() or bool(
            ((labels == labels.round()) | labels.isnan()).all()
        )

    @override
    @staticmethod
    def mark_unobserved(labels: Tensor, value: float) -> Tensor:
        if labels.is_floating_point():
            return labels.masked_fill(labels == value, torch.nan)
        return labels.to(torch.int64).masked_fill(labels == value, IGNORE_INDEX)

    @override
    @staticmethod
    def nll(logits: Tensor, labels: Tensor) -> Tensor:
        y = _check_classes(labels, logits)
        return sum_over_observations(
            functional.cross_entropy(logits, y, ignore_index=IGNORE_INDEX, reduction="none")
        )

    @override
    @staticmethod
    def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
        y = _check_classes(labels, logits)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        observed = sum_over_observations((y != IGNORE_INDEX).to(dtype))
        # No class is -100, so that what is not observed never counts as correct.
        return sum_over_observations((logits.argmax(dim=1) == y).to(dtype)) / observed

    @override
    @classmethod
    def regressands(cls, logits: Tensor, labels: Tensor) -> Tensor:
        y = _check_classes(labels, logits)
        found = exactly(functional.one_hot(y.clamp_min(0), logits.shape[1]))
        return found.masked_fill_((y == IGNORE_INDEX).unsqueeze(-1), torch.nan)

    @override
    @classmethod
    def check_logits(cls, logits: Tensor) -> None:
        if logits.ndim < 2 or logits.shape[1] < 2:
            raise ValueError(
                "the categorical likelihood needs logits of shape (samples, classes, *positions) "
                f"with at least 2 classes, got {tuple(logits.shape)}: pass forward= to map a "
                "batch to such logits"
            )
        # Of the likeliest class alone: -inf stands for a class that cannot be, not for an error.
        super().check_logits(logits.amax(1) if logits.numel() else logits)

    @override
    def residual(self) -> Tensor:
        return self._toward(self._labels())

    @override
    def unit_residual(self) -> Tensor:
        # All are scaled by the largest wrong class before they leave log space. So the residual
        # stays finite and exact however certain the model is, in float32 as well: the limit of its
        # direction exists where it is zero. In place, since a vocabulary may have many classes.
        y = self._by_class(self._labels())
        others = self._logits.scatter(1, y, -torch.inf)
        # Where no other class can be, all stay at -inf and the residual is zero.
        likeliest = others.amax(1, keepdim=True).clamp_min(torch.finfo(others.dtype).min)
        others = others.sub_(likeliest).exp_()
        right = others.sum(1, keepdim=True)
        length = torch.hypot(torch.linalg.vector_norm(others, dim=1, keepdim=True), right)
        scale = self._by_class(self._observed) / length.clamp_min(torch.finfo(length.dtype).tiny)
        return others.mul_(-scale).scatter_(1, y, right * scale)

    @override
    def drawn_residual(self, uniforms: Tensor) -> Tensor:
        return self._toward(_draw_classes(self._p, uniforms.unsqueeze(2)).squeeze(2))

    @override
    def signed(self, residual: Tensor, signs: Tensor) -> Tensor:
        return residual * self._by_class(signs)

    @override
    def parts(self) -> Tensor:
        p = self._p
        # 1 - p_c, for the likeliest class summed from the others, which loses no digits.
        top = p.argmax(2, keepdim=True)
        others = (1 - p).scatter(2, top, p.scatter(2, top, 0.0).sum(2, keepdim=True))
        # ||e_c - p||^2
        squares = p.square().sum(2, keepdim=True) - p.square() + others.square()
        return (self._weights * squares * self._observed.unsqueeze(2)).flatten(1)

    @override
    def drawn_parts(self, uniforms: Tensor) -> Tensor:
        drawn = _draw_classes(self._p, uniforms.unsqueeze(1))
        frequency = torch.full_like(drawn, 1 / uniforms.shape[1], dtype=self._log_p.dtype)
        self._weights = torch.zeros_like(self._log_p).scatter_add(2, drawn, frequency)
        return self.parts()

    @override
    def part(self, rows: Tensor, parts: Tensor) -> Tensor:
        classes = self._log_p.shape[2]
        place, y = parts // classes, parts % classes
        weight = self._weights[rows, place, y].sqrt() * self._observed[rows, place]
        direction = _residual(self._log_p[rows, place], y) * weight.unsqueeze(1)
        whole = direction.new_zeros(len(rows), *self._log_p.shape[1:])
        whole[torch.arange(len(rows), device=rows.device), place] = direction
        return self._as_logits(whole)

    def _as_logits(self, residual: Tensor) -> Tensor:
        """Brings ``(samples, observations, classes)`` into the logits' shape."""
        moved: Tensor = residual.movedim(-1, 1).to(self._logits.dtype)
        return moved.reshape(len(residual), moved.shape[1], *self._positions)

    def _by_class(self, observations: Tensor) -> Tensor:
        """Brings numbers of shape ``(samples, observations)`` to where all classes take them."""
        return observations.view(len(observations), 1, *self._positions)

    def _toward(self, y: Tensor) -> Tensor:
        """The residual of any labels, zero where nothing is observed."""
        return self._as_logits(_residual(self._log_p, y) * self._observed.unsqueeze(2))


def _draw_classes(p: Tensor, uniforms: Tensor) -> Tensor:
    """Draws classes by the inverse of the distribution function."""
    # On the CPU: a CUDA device may have no deterministic sum.
    cumulative = p.cpu().cumsum(dim=-1).to(p.device)
    drawn = torch.searchsorted(cumulative, uniforms * cumulative[..., -1:], right=True)
    return drawn.clamp_max(p.shape[-1] - 1)


def _residual(log_p: Tensor, y: Tensor) -> Tensor:
    """``e_y - p``, with ``1 - p_y`` summed from the other classes, which loses no digits."""
    others = log_p.exp().scatter(-1, y.unsqueeze(-1), 0.0)
    return (-others).scatter(-1, y.unsqueeze(-1), others.sum(dim=-1, keepdim=True))


def _check_classes(labels: Tensor, logits: Tensor) -> Tensor:
    """Refuses labels that are not class indices of the logits, and gives them as int64."""
    if not Categorical.are_labels(labels, logits):
        raise ValueError(
            f"labels must be class indices of shape {(logits.shape[0], *logits.shape[2:])}, got "
            f"{tuple(labels.shape)} of {labels.dtype}: pass forward= to return (logits, labels), "
            "or dataloader= with samples as they are, if training mixes them"
        )
    labels = labels.reshape(logits.shape[0], *logits.shape[2:])
    labels, classes = labels.nan_to_num(IGNORE_INDEX).to(torch.int64), logits.shape[1]
    observed = labels[labels != IGNORE_INDEX]
    if observed.numel() and (observed.min() < 0 or observed.max() >= classes):
        raise ValueError(
            f"labels must lie in [0, {classes}), got [{observed.min()}, {observed.max()}]: pass "
            f"ignore_index=, or forward= to label {IGNORE_INDEX} what is not observed"
        )
    return labels
