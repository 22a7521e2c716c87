"""Which gradients a Fisher information is the second moment of.

Every Fisher type is a second moment of back-propagated *residual directions*: vectors ``v`` in the
space of a sample's logits, ``F = mean over samples of the sum over directions of J' v v' J``, with
``J`` the Jacobian of the logits. A sample holds one or more *observations*, independent given its
logits: the positions of a categorical likelihood (tokens, pixels), the outputs of a Bernoulli or
Gaussian one. An observation with residual ``r`` (label minus mean) and label covariance ``S`` has

========== ====================================== ==================== =========================
type       directions of an observation           passes a sample      source
========== ====================================== ==================== =========================
exact      columns of a square root of ``S``      up to all logits     Martens, 2020, section 5
mc         ``r / sqrt(n)``, label drawn           n draws              the same
empirical  ``r``, the label its own               1                    Kunstner et al., 2019
normalised ``r / ||r||``                          1                    this package
========== ====================================== ==================== =========================

where ``S`` is ``diag(p) - p p'`` (categorical, ``p = softmax(logits)``), ``p (1 - p)`` (Bernoulli,
``p = sigmoid(logit)``) or 1 (Gaussian of unit variance).

The exact Fisher of a sample vanishes as the model grows certain of it, so a merge weighted by it
forgets what each client knows best. The normalised residual lets every observation speak with one
voice, however certain. A Bernoulli or Gaussian residual has one entry, so its unit residual is a
sign, whatever the label and even where the residual is zero: there, `normalised` is the
Gauss-Newton matrix ``J' J``. Several observations of one sample are back-propagated at once with
independent random signs, under which their cross terms vanish in expectation (Hutchinson, 1989).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_fedfisher.likelihoods.base import Bernoulli, Categorical, Gaussian, Likelihood

FisherType = Literal["exact", "mc", "empirical", "normalised"]
LikelihoodType = Literal["categorical", "bernoulli", "gaussian"]

FISHER_TYPES: tuple[FisherType, ...] = get_args(FisherType)
LIKELIHOODS: tuple[LikelihoodType, ...] = get_args(LikelihoodType)

Draw = Callable[[int], Tensor]
"""Gives uniform draws from [0, 1) of shape ``(samples, n)`` for a number ``n``."""


@dataclass(frozen=True)
class Directions:
    """Residual directions of a batch: one for every sample, and further ones for some.

    Attributes:
        first: of the logits' shape.
        rows: sample of each further direction, in order.
        further: further directions by their indices, a tensor of shape ``(k, *logits.shape[1:])``.
        trace: sum of the squared lengths of all directions, those left out included.
        discarded: part of it that was left out.
    """

    first: Tensor
    rows: Tensor
    further: Callable[[Tensor], Tensor]
    trace: float
    discarded: float = 0.0

    @property
    def counts(self) -> Tensor:
        """How many directions each sample has."""
        return 1 + torch.bincount(self.rows, minlength=len(self.first))

    def of(self, samples: Tensor) -> list[Tensor]:
        """All directions of some samples, those with fewer than others having zeros instead.

        Args:
            samples: their indices.

        Returns:
            As many as the sample with most has, each of the logits' shape for these samples.
        """
        place = torch.full_like(self.counts, -1)
        place[samples] = torch.arange(len(samples), device=samples.device)
        order = torch.arange(len(self.rows), device=self.rows.device)
        ranks = order - torch.searchsorted(self.rows, self.rows)
        found = [self.first[samples]]
        for rank in range(int(self.counts[samples].max()) - 1):
            indices = ((ranks == rank) & (place[self.rows] >= 0)).nonzero().squeeze(1)
            whole = torch.zeros_like(found[0])
            found.append(whole.index_copy(0, place[self.rows[indices]], self.further(indices)))
        return found


def residual_directions(
    logits: Tensor,
    labels: Tensor | None,
    fisher: FisherType,
    likelihood: LikelihoodType = "categorical",
    *,
    draw: Draw | None = None,
    draws: int = 1,
    tolerance: float = 0.0,
) -> Directions:
    """Directions in logit space whose back-propagated second moment is the Fisher.

    All arithmetic is in float64: a certain sample's residual is far below float32's resolution.

    Args:
        logits: of shape ``(samples, classes, *positions)``, at least two classes, for the
            categorical likelihood; means or logits of shape ``(samples, *outputs)`` for the others.
        labels: class indices of shape ``(samples, *positions)``, -100 where nothing is
            observed; of the logits' shape for the other likelihoods. Needed by ``empirical``, and
            by the categorical ``normalised``.
        fisher: the Fisher type.
        likelihood: of the labels given the logits.
        draw: uniform draws; needed by ``mc``, and by ``normalised`` of several observations.
        draws: directions a sample for the types that draw.
        tolerance: share of the batch's trace that ``exact`` may leave out.

    Returns:
        Directions, detached, in the logits' dtype.

    Raises:
        ValueError: if shapes, labels or logits cannot be those of the likelihood.
    """
    _check_logits(logits, likelihood)
    # Apple's GPUs have no float64.
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    values = logits.detach().to(exact)
    if likelihood == "categorical":
        space: Likelihood = Categorical(values, labels)
    else:
        space = (Bernoulli if likelihood == "bernoulli" else Gaussian)(values, labels)
    if fisher == "exact":
        found = _in_parts(space, space.parts(), tolerance)
    elif fisher == "empirical":
        found = _jointly([space.residual()])
    elif space.observations == 1 and fisher == "normalised":
        found = _jointly([space.unit_residual()])
    else:
        if draw is None:
            raise ValueError(f"the {fisher} Fisher of these labels needs uniform draws")
        uniforms = draw(draws * space.observations).to(values)
        uniforms = uniforms.reshape(len(logits), draws, space.observations).transpose(0, 1)
        if fisher == "mc" and likelihood == "categorical" and space.observations == 1:
            # Equal draws are one direction.
            found = _in_parts(space, space.parts(uniforms.squeeze(2).T), 0.0)
        elif fisher == "mc":
            found = _jointly([space.drawn_residual(u) / math.sqrt(draws) for u in uniforms])
        else:
            unit = space.unit_residual()
            signs = (uniforms < 0.5).to(unit) * 2 - 1
            found = _jointly([space.signed(unit, s) / math.sqrt(draws) for s in signs])
    dtype, further = logits.dtype, found.further
    return Directions(
        found.first.to(dtype),
        found.rows,
        lambda indices: further(indices).to(dtype),
        found.trace,
        found.discarded,
    )


def _check_logits(logits: Tensor, likelihood: LikelihoodType) -> None:
    if likelihood == "categorical" and (logits.ndim < 2 or logits.shape[1] < 2):
        raise ValueError(
            "the categorical likelihood needs logits of shape (samples, classes, *positions) with "
            f"at least 2 classes, got {tuple(logits.shape)}: pass `forward` to map a batch to such "
            "logits"
        )
    if logits.ndim < 1 or logits.numel() == 0:
        raise ValueError("a batch holds no samples: leave it out")
    if not torch.isfinite(logits).all():
        raise ValueError("the model's logits are not finite: it has diverged, or a batch holds NaN")


def _jointly(directions: list[Tensor]) -> Directions:
    """One direction of all observations together, or the same number of them for every sample."""
    samples = len(directions[0])
    rows = torch.arange(samples, device=directions[0].device).repeat_interleave(len(directions) - 1)
    stacked = torch.stack(directions)

    def further(indices: Tensor) -> Tensor:
        return stacked[indices % (len(directions) - 1) + 1, rows[indices]]

    trace = sum(float(direction.square().sum()) for direction in directions)
    return Directions(directions[0], rows, further, trace)


def _in_parts(space: Likelihood, squares: Tensor, tolerance: float) -> Directions:
    """The longest direction of every sample, and all others but the shortest of the batch."""
    trace = float(squares.sum())
    # On the CPU: a CUDA device may have no deterministic sum.
    ascending, order = squares.flatten().cpu().sort()
    kept = torch.zeros_like(ascending, dtype=torch.bool)
    kept[order] = (ascending.cumsum(0) > tolerance * trace) & (ascending > 0)
    kept = kept.view_as(squares).to(squares.device)
    longest = squares.argmax(dim=1, keepdim=True)
    kept.scatter_(1, longest, False)
    rows, parts = kept.nonzero(as_tuple=True)
    everyone = torch.arange(len(squares), device=squares.device)
    first = space.part(everyone, longest.squeeze(1))
    covered = float(squares.gather(1, longest).sum()) + float(squares[rows, parts].sum())
    return Directions(
        first, rows, lambda i: space.part(rows[i], parts[i]), trace, max(trace - covered, 0.0)
    )
