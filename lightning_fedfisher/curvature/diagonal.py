"""Diagonal curvature: one number for every weight, as in Fisher merging."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.curvature.linalg import (
    PseudoInverse,
    identity_map,
    pseudo_reciprocal,
)
from lightning_fedfisher.curvature.powers import TensorRole


@dataclass(frozen=True, eq=False)
class Diagonal(Curvature):
    """The operator ``F W = D * W``, with a curvature for every weight and none between two of them.

    (Matena & Raffel, 2022, "Merging Models with Fisher-Weighted Averaging".)

    Attributes:
        values: ``D``, of shape ``(rows, columns)``.

    Example:
        >>> import torch
        >>> Diagonal(torch.tensor([[1.0, 2.0]])).apply(torch.tensor([[3.0, 4.0]]))
        tensor([[3., 8.]])
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
    def tensor_shapes(cls, shape: tuple[int, int], kernel: int = 1) -> dict[str, tuple[int, ...]]:
        return {"values": shape}
