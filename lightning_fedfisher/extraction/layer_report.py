"""How each layer is treated: which moments of its gradient are summed, and by which way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_fedfisher.curvature.registry import EIGENBASED
from lightning_fedfisher.extraction.layer_types.base import LayerType
from lightning_fedfisher.layers import Layer

CurvatureType = Literal["identity", "diagonal", "kfac", "ekfac", "dense"]
CURVATURE_TYPES: tuple[CurvatureType, ...] = get_args(CurvatureType)


@dataclass(frozen=True)
class LayerReport:
    """How the curvature of one layer came about.

    Attributes:
        layer: the layer.
        kind: of its curvature block, a key of `KINDS`.
        way: ``hooks`` (its calls were watched), ``torch.func`` (each sample ran alone) or
            ``backpack``; ``none`` for the identity.
        reason: why not the kind or the way asked for; empty if it is.
    """

    layer: Layer
    kind: str
    way: str
    reason: str = ""


def kind_of(curvature: CurvatureType, operations: Sequence[LayerType] | None) -> str:
    """The kind of block a layer gets.

    Args:
        curvature: asked for.
        operations: what the layer's calls do; None if they are not known.

    Returns:
        A key of `KINDS`.
    """
    if curvature not in ("kfac", "ekfac"):
        return curvature
    (kind, *others) = {operation.kind for operation in operations or ()} or {"diagonal"}
    if others:
        return "diagonal"
    return EIGENBASED.get(kind, kind) if curvature == "ekfac" else kind


def describe(treatments: Iterable[LayerReport]) -> str:
    """A table of treatments: how many layers and weights, of which kind, which way, and why.

    Args:
        treatments: of a model's layers.

    Returns:
        One line for each combination.
    """
    alike: dict[tuple[str, str, str], list[Layer]] = {}
    for treatment in treatments:
        key = treatment.kind, treatment.way, treatment.reason
        alike.setdefault(key, []).append(treatment.layer)
    lines = []
    for (kind, way, reason), layers in alike.items():
        weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
        few = ", ".join(layer.name for layer in layers[:3]) + (", ..." if len(layers) > 3 else "")
        why = f"; {reason}" if reason else ""
        plural = "s" if len(layers) > 1 else ""
        lines.append(f"{kind} ({way}{why}): {len(layers)} layer{plural}, {weights} weights: {few}")
    return "\n".join(lines)
