"""Kinds of curvature: what one layer's Fisher information can look like.

Every merge method of this package minimises the same quadratic,
``sum_k p_k <W - W_k, F_k (W - W_k)>``, and differs only in the kind of ``F_k``. A kind knows how to
apply itself, how to raise itself to a power, what is left of it on either side of the matrix, its
diagonal and trace, and how to write itself out densely. Nothing else in the package branches on the
kind.

A layer's weights are a matrix ``W`` of shape ``(out, in)``, the bias being its last column. Dense
matrices act on ``W`` flattened row by row. All kinds are immutable.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NoReturn, Self

import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.curvature.input_map import InputMap
from lightning_fedfisher.curvature.linalg import (
    PseudoInverse,
    frobenius_norm,
    identity_map,
    require_positive_exponent,
)

TensorRole = Literal["factor", "values", "basis"]
"""What a tensor of a curvature is: a positive semi-definite matrix, eigenvalues, or a basis."""

InputSide = Literal["rows", "columns"]
"""The side of a layer's matrix that its inputs meet."""


class Curvature(ABC):
    """A symmetric positive semi-definite operator on one layer's weight matrix.

    Subclasses are frozen dataclasses whose tensors are exactly what a client sends.
    """

    kind: ClassVar[str]
    tensor_roles: ClassVar[Mapping[str, TensorRole]] = {}
    """What each of its tensors is, by field name."""
    elementwise: ClassVar[bool] = False
    """Whether the operator is its own diagonal, so that sums of it invert entry by entry."""
    inputs_on: ClassVar[InputSide | None] = None
    """The side of the matrix on which it holds the second moments of the layer's inputs.

    None if it does not hold them. With EKFAC's own spectrum they are those of inputs weighted by
    their gradients.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Shape ``(out, in)`` of the weight matrix it acts on."""

    @abstractmethod
    def apply(self, matrix: Tensor) -> Tensor:
        """Multiplies a weight matrix by the curvature.

        Args:
            matrix: of shape ``(out, in)``.

        Returns:
            ``F @ matrix``, of shape ``(out, in)``.
        """

    @abstractmethod
    def power(self, exponent: float) -> Curvature:
        """Raises the spectrum to a positive power; zero eigenvalues stay zero.

        Args:
            exponent: greater than zero.

        Returns:
            A curvature of the same kind.
        """

    @abstractmethod
    def pseudo_inverse(self, rcond: float) -> PseudoInverse:
        """Prepares to solve with the operator where it is not singular.

        Args:
            rcond: eigenvalues up to this share of the largest (for a Kronecker product, of either
                factor) count as zero.

        Returns:
            The pseudo-inverse, and the projection onto the directions that are left.
        """

    @abstractmethod
    def average_over_columns(self) -> Curvature:
        """Averages over the input side, so that all inputs of an output count the same.

        Returns:
            ``P x I / in`` with ``P`` the partial trace over the inputs; a curvature of the same
            kind and trace.
        """

    def of_inputs(self) -> Curvature:
        """The second moment of the inputs alone, as RegMean weighs them.

        Returns:
            ``W A``, or ``A W`` where inputs are on the rows, if the kind holds the inputs' second
            moment ``A``; else the identity.
        """
        return Identity(self.shape)

    def with_inputs(self, change: InputMap) -> Curvature:
        """The operator for other inputs, which the present ones are mapped to.

        Args:
            change: ``S``, from the present inputs to the others.

        Returns:
            ``V -> F(V S) S'``, of the same kind, to be applied and averaged.

        Raises:
            TypeError: unless the kind holds its inputs' second moments on the columns
                (`inputs_on`).
        """
        self._refuse_inputs()

    def _refuse_inputs(self) -> NoReturn:
        raise TypeError(
            f"{self.kind} curvature does not hold the second moments of its inputs on its columns"
        )

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Diagonal of the operator, as a matrix of shape ``(out, in)``."""

    def trace(self) -> Tensor:
        """Sum of the eigenvalues, a scalar."""
        return self.diagonal().sum()

    def eigenvalues(self) -> Tensor:
        """All eigenvalues, in no particular order, of shape ``(out, in)``."""
        return self.diagonal()

    def norm(self) -> Tensor:
        """Root of the sum of the eigenvalues' squares, a scalar in float64."""
        return frobenius_norm(self.eigenvalues())

    @abstractmethod
    def sensitivities(self) -> dict[str, float]:
        """How far its square root moves when the roots of its tensors do.

        The root of a factor or of eigenvalues is their square root; a basis is its own.

        Returns:
            By field name, ``||d F^(1/2)||^2`` to first order for a unit error in an entry of the
            tensor's root, in the mean over entries.
        """

    def dense(self) -> Tensor:
        """The operator as an ``(out * in, out * in)`` matrix, for small layers and tests."""
        diagonal = self.diagonal()
        basis = torch.eye(diagonal.numel(), dtype=diagonal.dtype, device=diagonal.device)
        return torch.stack([self.apply(row.view(self.shape)).flatten() for row in basis], dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that define the operator, by field name."""
        return {name: getattr(self, name) for name in self.tensor_shapes(self.shape)}

    @classmethod
    def mean(cls, curvatures: Iterable[Curvature], shares: Sequence[float]) -> Curvature:
        """One curvature that stands for a weighted sum of others, and that can be inverted.

        Every defining tensor is averaged. That is the sum itself where the kind is linear in its
        tensors, and close to it where it is not. They are gone through once, one at a time.

        Args:
            curvatures: of this kind, on weight matrices of one shape.
            shares: weights that sum to one.

        Returns:
            The mean.
        """
        means: dict[str, Tensor] = {}
        for share, curvature in zip(shares, curvatures, strict=True):
            shape = curvature.shape
            for name, tensor in curvature.tensors().items():
                means[name] = means.get(name, torch.zeros_like(tensor)) + share * tensor
        return cls.from_tensors(means, shape)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Self:
        """Rebuilds the operator from `tensors`.

        Args:
            tensors: by field name.
            shape: of the weight matrix it must act on.

        Returns:
            The curvature.

        Raises:
            ValueError: if a tensor is missing, unknown or of the wrong shape.
        """
        expected = cls.tensor_shapes(shape)
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != expected:
            raise ValueError(
                f"{cls.kind} curvature of a {shape} matrix needs tensors of shapes {expected}, "
                f"got {found}"
            )
        return cls._build(tensors, shape)

    @classmethod
    def _build(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Self:
        return cls(**tensors)

    @classmethod
    @abstractmethod
    def tensor_shapes(cls, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor for a weight matrix of the given shape, in field order."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Moves the operator to a device and floating type."""
        moved = {name: tensor.to(device, dtype) for name, tensor in self.tensors().items()}
        return type(self).from_tensors(moved, self.shape)


@dataclass(frozen=True, eq=False)
class Identity(Curvature):
    """``F W = W``: every weight counts the same. The curvature of FedAvg."""

    size: tuple[int, int]
    kind: ClassVar[str] = "identity"
    elementwise: ClassVar[bool] = True

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.size

    @override
    def apply(self, matrix: Tensor) -> Tensor:
        return matrix

    @override
    def power(self, exponent: float) -> Identity:
        require_positive_exponent(exponent)
        return self

    @override
    def pseudo_inverse(self, rcond: float) -> PseudoInverse:
        ones = torch.ones(self.size)
        return PseudoInverse(identity_map, identity_map, ones, ones)

    @override
    def average_over_columns(self) -> Identity:
        return self

    @override
    def diagonal(self) -> Tensor:
        return torch.ones(self.size)

    @override
    def sensitivities(self) -> dict[str, float]:
        return {}

    @classmethod
    @override
    def tensor_shapes(cls, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        return {}

    @classmethod
    @override
    def _build(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Self:
        return cls(shape)
