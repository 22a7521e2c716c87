"""Reports which block of curvature each layer got, which backend computed it, and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

from lightning_fedfisher.curvature.registry import (
    EIGEN_CORRECTED,
    INPUT_KINDS,
    KINDS,
    CurvatureType,
)
from lightning_fedfisher.extraction.layer_types.base import LayerType, are_alike
from lightning_fedfisher.layers import Layer

CURVATURE_TYPES: tuple[CurvatureType, ...] = get_args(CurvatureType)

# Rows of a factor that takes a gibibyte in float32, and a server's decomposition minutes.
_LARGEST_FACTOR = 2**14
_NAMED_LAYERS = 3  # in a line of `format_layer_reports`, so that a line stays a line


@dataclass(frozen=True)
class LayerReport:
    """Tells how the curvature of one layer was computed.

    Attributes:
        layer: The layer.
        kind: Kind of its block, a key of `lightning_fedfisher.curvature.KINDS`.
        backend: ``"hooks"`` if the calls of the layer were watched, ``"torch.func"`` if each sample
            ran alone, ``"backpack"``, or ``"none"`` for the identity, which needs no samples.
        reason: Why the layer did not get the kind of block that was asked for, or not by the first
            choice of backend. Empty if it did.
        some_positions: Whether its factors are computed from some positions of each sample only.

    Example:
        >>> LayerReport(Layer("fc", (("fc.weight", (2, 3)),)), "kronecker", "hooks").reason
        ''
    """

    layer: Layer
    kind: str
    backend: str
    reason: str = ""
    some_positions: bool = False


def block_kind(
    curvature: CurvatureType, layer_types: Sequence[LayerType] | None, layer: Layer | None = None
) -> str:
    """Decides which kind of block a layer gets.

    Args:
        curvature: Curvature that the extraction was asked for.
        layer_types: What each call of the layer computes. None if that is not known.
        layer: The layer, whose factors may be too large; None for one of any size.

    Returns:
        A key of `lightning_fedfisher.curvature.KINDS`. It is ``"diagonal"`` if Kronecker factors
        were asked for and the layer has none or too large ones, and ``"identity"`` if an input Gram
        was.

    Example:
        >>> from lightning_fedfisher.extraction.layer_types.linear import Linear
        >>> block_kind("kfac", [Linear(has_bias=True)]), block_kind("kfac", None)
        ('kronecker', 'diagonal')
    """
    if curvature not in ("input_gram", "kfac", "ekfac"):
        return curvature
    if layer is not None and too_large(curvature, layer_types, layer):
        return "identity" if curvature == "input_gram" else "diagonal"
    corrected = curvature == "ekfac"
    types = layer_types or ()
    kinds = {t.kind if corrected else t.kfac_kind for t in types}
    kind = kinds.pop() if are_alike(types) and len(kinds) == 1 else "diagonal"
    if curvature == "input_gram":
        return INPUT_KINDS.get(kind, "identity")
    return EIGEN_CORRECTED.get(kind, kind) if corrected else kind


def too_large(
    curvature: CurvatureType, layer_types: Sequence[LayerType] | None, layer: Layer
) -> str:
    """Says why a layer's factors are too large; empty if they are not.

    Args:
        curvature: Curvature that the extraction was asked for.
        layer_types: What each call of the layer computes. None if that is not known.
        layer: The layer.
    """
    shapes = KINDS[block_kind(curvature, layer_types)].tensor_shapes(layer.shape, layer.kernel)
    sides = [min(shape) for shape in shapes.values() if len(shape) == 2]
    if curvature == "dense" or max(sides, default=0) <= _LARGEST_FACTOR:
        return ""
    return f"a factor of {max(sides)} rows would be too large"


def format_layer_reports(reports: Iterable[LayerReport]) -> str:
    """Writes the reports of a model's layers as text.

    Args:
        reports: One report for each layer.

    Returns:
        One line for each combination of kind, backend and reason, with the number of layers and
        weights and the names of the first layers.

    Example:
        >>> layer = Layer("fc", (("fc.weight", (2, 3)), ("fc.bias", (2,))))
        >>> print(format_layer_reports([LayerReport(layer, "kronecker", "hooks")]))
        kronecker (hooks): 1 layer, 8 weights: fc
    """
    alike: dict[tuple[str, str, str], list[Layer]] = {}
    for report in reports:
        how = "some positions" if report.some_positions else ""
        key = report.kind, report.backend, "; ".join(filter(None, (how, report.reason)))
        alike.setdefault(key, []).append(report.layer)
    lines = []
    for (kind, backend, reason), layers in alike.items():
        weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
        names = ", ".join(layer.name for layer in layers[:_NAMED_LAYERS])
        names += ", ..." if len(layers) > _NAMED_LAYERS else ""
        why = f"; {reason}" if reason else ""
        plural = "s" if len(layers) > 1 else ""
        lines.append(
            f"{kind} ({backend}{why}): {len(layers)} layer{plural}, {weights} weights: {names}"
        )
    return "\n".join(lines)
