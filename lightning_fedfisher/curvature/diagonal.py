"""Diagonal curvature: a number for every weight, as in Fisher merging."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.curvature.base import Curvature, TensorRole
from lightning_fedfisher.curvature.linalg import (
    PseudoInverse,
    identity_map,
    pseudo_reciprocal,
    require_positive_exponent,
)


@dataclass(frozen=True, eq=False)
class Diagonal(Curvature):
    """``F W = D * W``: a curvature of its own for every weight, none between them.

    Attributes:
        values: ``D``, of shape ``(out, in)``.
    """

    values: Tensor
    kind: ClassVar[str] = "diagonal"
    tensor_roles: ClassVar[Mapping[str, TensorRole]] = {"values": "values"}
    elementwise: ClassVar[bool] = True

    @property
    @override
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return rows, columns

    @override
    def apply(self, matrix: Tensor) -> Tensor:
        return self.values * matrix

    @override
    def power(self, exponent: float) -> Diagonal:
        require_positive_exponent(exponent)
        return Diagonal(self.values.clamp_min(0).pow(exponent))

    @override
    def pseudo_inverse(self, rcond: float) -> PseudoInverse:
        return PseudoInverse(identity_map, identity_map, *pseudo_reciprocal(self.values, rcond))

    @override
    def average_over_columns(self) -> Diagonal:
        return Diagonal(self.values.mean(1, keepdim=True).expand_as(self.values).contiguous())

    @override
    def diagonal(self) -> Tensor:
        return self.values

    @override
    def sensitivities(self) -> dict[str, float]:
        return {"values": 1.0}

    @classmethod
    @override
    def tensor_shapes(cls, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        return {"values": shape}
