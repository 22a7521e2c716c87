"""Which gradients a Fisher information is the second moment of.

Every Fisher type is a second moment of back-propagated *residual directions*: vectors ``v`` in the
space of a sample's logits, ``F = mean over samples of the sum over directions of J' v v' J``, with
``J`` the Jacobian of the logits. For the categorical likelihood with ``p = softmax(logits)``:

========== ===================================== =============== ================================
type       directions of a sample                how many        source
========== ===================================== =============== ================================
exact      ``sqrt(p_c) (e_c - p)``, every class  classes         Martens, 2020, section 5
mc         ``(e_y - p) / sqrt(n)``, ``y ~ p``    n draws         the same
empirical  ``e_y - p``, ``y`` the label          1               Kunstner et al., 2019
normalised ``(e_y - p) / ||e_y - p||``           1               this package
========== ===================================== =============== ================================

The exact Fisher of a sample vanishes as the model grows certain of it, so a merge weighted by it
forgets what each client knows best. The normalised residual lets every sample speak with one voice.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

FisherType = Literal["exact", "mc", "empirical", "normalised"]
LikelihoodType = Literal["categorical"]

FISHER_TYPES: tuple[FisherType, ...] = get_args(FisherType)
LIKELIHOODS: tuple[LikelihoodType, ...] = get_args(LikelihoodType)


def residual_directions(
    logits: Tensor, labels: Tensor | None, fisher: FisherType, uniforms: Tensor | None = None
) -> Tensor:
    """Directions in logit space whose back-propagated second moment is the Fisher.

    All arithmetic is in float64: a certain sample's residual is far below float32's resolution.

    Args:
        logits: of shape ``(samples, classes)``, at least two classes.
        labels: class indices of shape ``(samples,)``; needed by ``empirical`` and ``normalised``.
        fisher: the Fisher type.
        uniforms: draws from [0, 1) of shape ``(samples, n)``; needed by ``mc``.

    Returns:
        Directions of shape ``(n, samples, classes)``, detached, in the logits' dtype.

    Raises:
        ValueError: if shapes, labels or logits cannot be those of a classifier.
    """
    _check_logits(logits)
    # Apple's GPUs have no float64.
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    log_p = torch.log_softmax(logits.detach().to(exact), dim=1)
    classes = logits.shape[1]
    if fisher == "exact":
        p = log_p.exp()
        one_hot = torch.eye(classes, dtype=exact, device=p.device)
        directions = p.sqrt().T.unsqueeze(2) * (one_hot.unsqueeze(1) - p)
    elif fisher == "mc":
        if uniforms is None:
            raise ValueError("the mc Fisher needs uniform draws")
        cumulative = log_p.exp().cumsum(dim=1)
        drawn = torch.searchsorted(
            cumulative, uniforms.to(cumulative) * cumulative[:, -1:], right=True
        )
        drawn = drawn.clamp_max(classes - 1).T
        directions = torch.stack([_residual(log_p, y) for y in drawn]) / len(drawn) ** 0.5
    else:
        y = _check_labels(labels, logits)
        residual = _unit_residual(log_p, y) if fisher == "normalised" else _residual(log_p, y)
        directions = residual.unsqueeze(0)
    result: Tensor = directions.to(logits.dtype)
    return result


def _residual(log_p: Tensor, y: Tensor) -> Tensor:
    """``e_y - p``, with ``1 - p_y`` summed from the other classes, which loses no digits."""
    others = log_p.exp().scatter(1, y.unsqueeze(1), 0.0)
    return (-others).scatter(1, y.unsqueeze(1), others.sum(dim=1, keepdim=True))


def _unit_residual(log_p: Tensor, y: Tensor) -> Tensor:
    """``e_y - p`` at unit length.

    Scaled by the largest wrong class before leaving log space, so that it stays finite and exact
    however certain the model is: the limit of the direction exists where the residual is zero.
    """
    others = log_p.scatter(1, y.unsqueeze(1), -torch.inf)
    residual = _residual(others - others.amax(dim=1, keepdim=True), y)
    length: Tensor = torch.linalg.vector_norm(residual, dim=1, keepdim=True)
    return residual / length


def _check_logits(logits: Tensor) -> None:
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            "the categorical likelihood needs logits of shape (samples, classes) with at least "
            f"2 classes, got {tuple(logits.shape)}: pass `forward` to map a batch to such logits"
        )
    if len(logits) == 0:
        raise ValueError("a batch holds no samples: leave it out")
    if not torch.isfinite(logits).all():
        raise ValueError("the model's logits are not finite: it has diverged, or a batch holds NaN")


def _check_labels(labels: Tensor | None, logits: Tensor) -> Tensor:
    samples, classes = logits.shape
    if labels is None:
        raise ValueError("this Fisher type needs labels, and the batch holds none")
    if labels.shape != (samples,) or labels.is_floating_point():
        raise ValueError(
            f"labels must be class indices of shape ({samples},), got {tuple(labels.shape)} "
            f"of {labels.dtype}"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must lie in [0, {classes}), got [{labels.min()}, {labels.max()}]")
    return labels.to(torch.int64)
