"""Which gradients a Fisher information is the second moment of.

Every Fisher type is a second moment of back-propagated *residual directions*: vectors ``v`` in the
space of a sample's logits, ``F = mean over samples of the sum over directions of J' v v' J``, with
``J`` the Jacobian of the logits. A sample holds one or more *observations* (see `likelihoods`). An
observation with residual ``r`` (label minus mean) and label covariance ``S`` has these directions:

========== ====================================== ==================== =========================
type       directions of an observation           passes a sample      source
========== ====================================== ==================== =========================
exact      columns of a square root of ``S``      up to all logits     Martens, 2020, section 5
mc         ``r / sqrt(n)``, label drawn           n draws              the same
empirical  ``r``, the label its own               1                    Kunstner et al., 2019
normalised ``r / ||r||``                          1                    this package
========== ====================================== ==================== =========================

Here ``S`` is ``diag(p) - p p'`` (categorical, ``p = softmax(logits)``), ``p (1 - p)`` (Bernoulli,
``p = sigmoid(logit)``) or 1 (Gaussian of unit variance).

The exact Fisher of a sample vanishes as the model grows certain of it, so a merge weighted by it
forgets what each client knows best. The normalised residual gives every observation the same
length, however certain the model is. A Bernoulli or Gaussian residual has one entry, so its unit
residual is a sign, whatever the label and even where the residual is zero: there, `normalised` is
the Gauss-Newton matrix ``J' J``. Several observations of one sample are back-propagated at once
with independent random signs, under which their cross terms vanish in expectation (Hutchinson,
1989).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_fedfisher.likelihoods.base import Likelihood, exactly
from lightning_fedfisher.likelihoods.categorical import Categorical
from lightning_fedfisher.likelihoods.registry import LIKELIHOODS

FisherType = Literal["exact", "mc", "empirical", "normalised"]
"""Which label a sample's gradients are taken for (see the table in `fisher_types`)."""

FISHER_TYPES: tuple[FisherType, ...] = get_args(FisherType)

Draw = Callable[[int], Tensor]
"""A function from a number ``n`` to uniform draws from [0, 1) of shape ``(samples, n)``."""


@dataclass(frozen=True)
class Directions:
    """The residual directions of a batch: one for every sample, and further ones for some.

    Attributes:
        first: First direction of every sample, of the logits' shape.
        rows: Sample that each further direction belongs to, in ascending order.
        further: Function from indices of ``k`` further directions to these directions, a tensor of
            shape ``(k, *logits.shape[1:])``.
        trace: Sum of the squared lengths of all directions, those left out included.
        discarded: Part of that sum that belongs to directions left out.
    """

    first: Tensor
    rows: Tensor
    further: Callable[[Tensor], Tensor]
    trace: float
    discarded: float = 0.0

    @property
    def counts(self) -> Tensor:
        """Number of directions of each sample, of shape ``(samples,)``."""
        return 1 + torch.bincount(self.rows, minlength=len(self.first))

    def of(self, samples: Tensor) -> list[Tensor]:
        """Gives all directions of some samples, filled up with zeros to the same number for each.

        Args:
            samples: Indices of the samples.

        Returns:
            As many tensors as the sample with the most directions has, each of shape
            ``(len(samples), *logits.shape[1:])``.
        """
        position = torch.full_like(self.counts, -1)
        position[samples] = torch.arange(len(samples), device=samples.device)
        order = torch.arange(len(self.rows), device=self.rows.device)
        # The how-many-th further direction of its sample each one is.
        places = order - torch.searchsorted(self.rows, self.rows)
        found = [self.first[samples]]
        for place in range(int(self.counts[samples].max()) - 1):
            indices = ((places == place) & (position[self.rows] >= 0)).nonzero().squeeze(1)
            whole = torch.zeros_like(found[0])
            rows = position[self.rows[indices]]
            found.append(whole.index_copy(0, rows, self.further(indices)))
        return found


def residual_directions(
    logits: Tensor,
    labels: Tensor | None,
    fisher: FisherType,
    likelihood: str = Categorical.name,
    *,
    draw: Draw | None = None,
    draws: int = 1,
    tolerance: float = 0.0,
) -> Directions:
    """Finds directions in logit space whose back-propagated second moment is the Fisher.

    Likelihoods see to it that the residual of a sample that the model is certain of, which is far
    below the resolution of float32, keeps its digits.

    Args:
        logits: Output of the model; its shape is told by the likelihood's class.
        labels: Labels of the batch, or None. They are needed by ``"empirical"``, and by
            ``"normalised"`` with a categorical likelihood. The others learn from them what is not
            observed, and leave alone what has not the form of labels.
        fisher: Fisher type.
        likelihood: Name of the likelihood, a key of `LIKELIHOODS`.
        draw: Source of uniform draws. It is needed by ``"mc"``, and by ``"normalised"`` if a sample
            has several observations.
        draws: Number of directions of each sample, for the types that draw.
        tolerance: Share of the batch's trace, from 0 to 1, that ``"exact"`` may leave out.

    Returns:
        The directions, without a graph, in the logits' dtype.

    Raises:
        ValueError: If shapes, labels or logits cannot be those of the likelihood.

    Example:
        >>> logits, labels = torch.tensor([[0.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 1])
        >>> residual_directions(logits, labels, "normalised").first
        tensor([[ 0.7071, -0.7071],
                [-0.7071,  0.7071]])
    """
    kind = LIKELIHOODS[likelihood]
    kind.check_logits(logits)
    needed = fisher == "empirical" or (fisher == "normalised" and kind.softmax)
    if labels is not None and not needed and not kind.are_labels(labels, logits):
        labels = None  # mixed ones, or something else: nobody asks for them
    given = kind(logits.detach(), labels)
    if fisher == "exact":
        found = _in_parts(given, given.parts(), tolerance)
    elif fisher == "empirical":
        found = _jointly([given.residual()])
    elif given.observations == 1 and fisher == "normalised":
        found = _jointly([given.unit_residual()])
    else:
        if draw is None:
            raise ValueError(f"the {fisher} Fisher of these labels needs uniform draws")
        uniforms = exactly(draw(draws * given.observations).to(logits.device))
        uniforms = uniforms.reshape(len(logits), draws, given.observations).transpose(0, 1)
        found = (_drawn if fisher == "mc" else _randomly_signed)(given, uniforms)
    dtype, further = logits.dtype, found.further
    return Directions(
        found.first.to(dtype),
        found.rows,
        lambda indices: further(indices).to(dtype),
        found.trace,
        found.discarded,
    )


def _drawn(likelihood: Likelihood, uniforms: Tensor) -> Directions:
    """Directions of labels drawn from the model, by draws of shape (draws, samples, observations).

    Equal draws of a sample's only observation are one direction, where the likelihood can tell.
    """
    if likelihood.observations == 1:
        squares = likelihood.drawn_parts(uniforms.squeeze(2).T)
        if squares is not None:
            return _in_parts(likelihood, squares, 0.0)
    return _jointly([likelihood.drawn_residual(u) / math.sqrt(len(uniforms)) for u in uniforms])


def _randomly_signed(likelihood: Likelihood, uniforms: Tensor) -> Directions:
    """Unit residuals with random signs, by draws of shape (draws, samples, observations)."""
    unit = likelihood.unit_residual()
    signs = ((uniforms < 0.5).to(unit) * 2 - 1) / math.sqrt(len(uniforms))
    return _jointly([likelihood.signed(unit, s) for s in signs])


def _jointly(directions: list[Tensor]) -> Directions:
    """Directions that are the same number for every sample, each of all observations together."""
    samples = len(directions[0])
    rows = torch.arange(samples, device=directions[0].device).repeat_interleave(len(directions) - 1)
    # One direction of many classes is not copied for nothing.
    stacked = torch.stack(directions) if len(directions) > 1 else directions[0].unsqueeze(0)

    def further(indices: Tensor) -> Tensor:
        return stacked[indices % (len(directions) - 1) + 1, rows[indices]]

    trace = sum(float(direction.square().sum()) for direction in directions)
    return Directions(directions[0], rows, further, trace)


def _in_parts(likelihood: Likelihood, squares: Tensor, tolerance: float) -> Directions:
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
    first = likelihood.part(everyone, longest.squeeze(1))
    covered = float(squares.gather(1, longest).sum()) + float(squares[rows, parts].sum())
    return Directions(
        first,
        rows,
        lambda i: likelihood.part(rows[i], parts[i]),
        trace,
        max(trace - covered, 0.0),
    )
