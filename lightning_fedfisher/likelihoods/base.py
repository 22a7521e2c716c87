"""What a batch's logits say of its labels: residuals of observations, for each likelihood."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

IGNORE_INDEX = -100
"""Label of a position that is not observed, as in `torch.nn.functional.cross_entropy`."""


class Likelihood(ABC):
    """Logits of a batch as observations, and the label's distribution given them.

    Attributes:
        observations: how many a sample has.
    """

    observations: int
    _y: Tensor | None

    def _labels(self) -> Tensor:
        if self._y is None:
            raise ValueError("this Fisher type needs labels, and the batch holds none")
        return self._y

    @abstractmethod
    def residual(self) -> Tensor:
        """Label minus mean, of the logits' shape."""

    @abstractmethod
    def unit_residual(self) -> Tensor:
        """The same with every observation's residual scaled to unit length."""

    @abstractmethod
    def drawn_residual(self, uniforms: Tensor) -> Tensor:
        """Label minus mean, the label drawn with uniforms of shape ``(samples, observations)``."""

    @abstractmethod
    def signed(self, residual: Tensor, signs: Tensor) -> Tensor:
        """A residual times one sign an observation, of shape ``(samples, observations)``."""

    @abstractmethod
    def parts(self, uniforms: Tensor | None = None) -> Tensor:
        """Squared lengths of the directions that make up the label's covariance.

        Args:
            uniforms: draws of the only observation, whose frequencies stand in for probabilities.

        Returns:
            Of shape ``(samples, parts)``.
        """

    @abstractmethod
    def part(self, rows: Tensor, parts: Tensor) -> Tensor:
        """One direction of each given sample, of shape ``(rows, *logits.shape[1:])``."""


class Categorical(Likelihood):
    """Classes along the second dimension, one observation at each of the positions behind."""

    def __init__(self, logits: Tensor, labels: Tensor | None) -> None:
        """Reads logits and labels.

        Args:
            logits: of a batch, samples first.
            labels: of the batch, if it has any.

        Raises:
            ValueError: if the labels cannot be those of the logits.
        """
        self._positions = logits.shape[2:]
        self.observations = math.prod(self._positions)
        # (samples, observations, classes)
        log_p = torch.log_softmax(logits, dim=1)
        self._log_p = log_p.reshape(*logits.shape[:2], -1).movedim(1, -1)
        self._y: Tensor | None = None
        self._observed = self._log_p.new_ones(self._log_p.shape[:2])
        if labels is not None:
            y = _check_classes(labels, logits).reshape(len(logits), -1)
            self._observed = (y != IGNORE_INDEX).to(self._log_p)
            self._y = y.clamp_min(0)
        self._weights = self._log_p.exp()

    def _as_logits(self, residual: Tensor) -> Tensor:
        moved: Tensor = residual.movedim(-1, 1)
        return moved.reshape(len(residual), moved.shape[1], *self._positions)

    def _toward(self, y: Tensor) -> Tensor:
        return self._as_logits(_residual(self._log_p, y) * self._observed.unsqueeze(2))

    @override
    def residual(self) -> Tensor:
        return self._toward(self._labels())

    @override
    def unit_residual(self) -> Tensor:
        unit = _unit_residual(self._log_p, self._labels())
        return self._as_logits(unit * self._observed.unsqueeze(2))

    @override
    def drawn_residual(self, uniforms: Tensor) -> Tensor:
        return self._toward(_drawn(self._log_p, uniforms.unsqueeze(2)).squeeze(2))

    @override
    def signed(self, residual: Tensor, signs: Tensor) -> Tensor:
        return residual * signs.view(len(signs), 1, *self._positions)

    @override
    def parts(self, uniforms: Tensor | None = None) -> Tensor:
        p = self._log_p.exp()
        if uniforms is not None:
            drawn = _drawn(self._log_p, uniforms.unsqueeze(1))
            self._weights = torch.zeros_like(p).scatter_add(
                2, drawn, torch.full_like(drawn, 1 / uniforms.shape[1], dtype=p.dtype)
            )
        # 1 - p_c, for the likeliest class summed from the others, which loses no digits.
        top = p.argmax(2, keepdim=True)
        others = (1 - p).scatter(2, top, p.scatter(2, top, 0.0).sum(2, keepdim=True))
        # ||e_c - p||^2
        squares = p.square().sum(2, keepdim=True) - p.square() + others.square()
        return (self._weights * squares * self._observed.unsqueeze(2)).flatten(1)

    @override
    def part(self, rows: Tensor, parts: Tensor) -> Tensor:
        classes = self._log_p.shape[2]
        place, y = parts // classes, parts % classes
        weight = self._weights[rows, place, y].sqrt() * self._observed[rows, place]
        direction = _residual(self._log_p[rows, place], y) * weight.unsqueeze(1)
        whole = direction.new_zeros(len(rows), *self._log_p.shape[1:])
        whole[torch.arange(len(rows), device=rows.device), place] = direction
        return self._as_logits(whole)


class _Outputs(Likelihood):
    """Every logit is an observation of its own, with one entry."""

    def __init__(self, logits: Tensor, labels: Tensor | None) -> None:
        self._logits = logits
        self._y = None if labels is None else _check_values(labels, logits).to(logits)
        self.observations = math.prod(logits.shape[1:])

    @abstractmethod
    def _variance(self) -> Tensor:
        """Of each label given its logit."""

    @override
    def unit_residual(self) -> Tensor:
        return torch.ones_like(self._logits)

    @override
    def signed(self, residual: Tensor, signs: Tensor) -> Tensor:
        return residual * signs.view_as(residual)

    @override
    def parts(self, uniforms: Tensor | None = None) -> Tensor:
        return self._variance().reshape(len(self._logits), -1)

    @override
    def part(self, rows: Tensor, parts: Tensor) -> Tensor:
        variance = self._variance().reshape(len(self._logits), -1)
        whole = variance.new_zeros(len(rows), variance.shape[1])
        whole[torch.arange(len(rows), device=rows.device), parts] = variance[rows, parts].sqrt()
        result: Tensor = whole.reshape(len(rows), *self._logits.shape[1:])
        return result


class Bernoulli(_Outputs):
    """Every logit is the log-odds of a label that is 0 or 1."""

    def __init__(self, logits: Tensor, labels: Tensor | None) -> None:
        """Reads logits and labels.

        Args:
            logits: of a batch, samples first.
            labels: of the batch, if it has any.

        Raises:
            ValueError: if the labels cannot be those of the logits.
        """
        super().__init__(logits, labels)
        if self._y is not None and not ((self._y >= 0) & (self._y <= 1)).all():
            raise ValueError("labels of a Bernoulli likelihood must lie in [0, 1]")

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


class Gaussian(_Outputs):
    """Every output is the mean of a label of unit variance."""

    @override
    def residual(self) -> Tensor:
        return self._labels() - self._logits

    @override
    def drawn_residual(self, uniforms: Tensor) -> Tensor:
        tiny = torch.finfo(uniforms.dtype).tiny
        normal: Tensor = torch.special.ndtri(uniforms.clamp_min(tiny))
        return normal.view_as(self._logits)

    @override
    def _variance(self) -> Tensor:
        return torch.ones_like(self._logits)


def _drawn(log_p: Tensor, uniforms: Tensor) -> Tensor:
    """Classes drawn by the inverse of the distribution function."""
    # On the CPU: a CUDA device may have no deterministic sum.
    cumulative = log_p.exp().cpu().cumsum(dim=-1).to(log_p.device)
    drawn = torch.searchsorted(cumulative, uniforms * cumulative[..., -1:], right=True)
    return drawn.clamp_max(log_p.shape[-1] - 1)


def _residual(log_p: Tensor, y: Tensor) -> Tensor:
    """``e_y - p``, with ``1 - p_y`` summed from the other classes, which loses no digits."""
    others = log_p.exp().scatter(-1, y.unsqueeze(-1), 0.0)
    return (-others).scatter(-1, y.unsqueeze(-1), others.sum(dim=-1, keepdim=True))


def _unit_residual(log_p: Tensor, y: Tensor) -> Tensor:
    """``e_y - p`` at unit length.

    Scaled by the largest wrong class before leaving log space, so that it stays finite and exact
    however certain the model is: the limit of the direction exists where the residual is zero.
    """
    others = log_p.scatter(-1, y.unsqueeze(-1), -torch.inf)
    residual = _residual(others - others.amax(dim=-1, keepdim=True), y)
    length: Tensor = torch.linalg.vector_norm(residual, dim=-1, keepdim=True)
    return residual / length


def _check_classes(labels: Tensor, logits: Tensor) -> Tensor:
    expected = (logits.shape[0], *logits.shape[2:])
    classes = logits.shape[1]
    if labels.shape != expected or labels.is_floating_point():
        raise ValueError(
            f"labels must be class indices of shape {expected}, got {tuple(labels.shape)} "
            f"of {labels.dtype}"
        )
    observed = labels[labels != IGNORE_INDEX]
    if observed.numel() and (observed.min() < 0 or observed.max() >= classes):
        raise ValueError(
            f"labels must lie in [0, {classes}), got [{observed.min()}, {observed.max()}]"
        )
    return labels.to(torch.int64)


def _check_values(labels: Tensor, logits: Tensor) -> Tensor:
    if labels.shape != logits.shape:
        raise ValueError(
            f"labels must have the logits' shape {tuple(logits.shape)}, got {tuple(labels.shape)}"
        )
    if not torch.isfinite(labels).all():
        raise ValueError("labels must be finite")
    return labels
