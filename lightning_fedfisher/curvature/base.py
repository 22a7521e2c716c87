"""What every kind of curvature can do: a Fisher information matrix as an operator on weights.

All merge methods of this package minimise the same quadratic,
``sum_k p_k <W - W_k, F_k (W - W_k)>`` over clients ``k``, and differ only in the kind of ``F_k``. A
kind knows how to multiply, to raise itself to a power, to invert itself, its trace, and how to
write itself out densely. Nothing else in the package branches on the kind.

The weights of a layer are a matrix ``W`` of shape ``(rows, columns)``, whose last column is the
bias. A dense curvature acts on ``W`` flattened row by row. All kinds are immutable.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NoReturn, Self

import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.curvature.input_map import InputMap
from lightning_fedfisher.curvature.linalg import PseudoInverse, frobenius_norm, identity_map
from lightning_fedfisher.curvature.powers import TensorRole, require_positive_exponent, tensor_power

InputSide = Literal["rows", "columns"]
"""The side of a layer's matrix that belongs to its inputs."""


class Curvature(ABC):
    """A symmetric positive semi-definite operator on the weight matrix of one layer.

    Subclasses are frozen dataclasses. Their tensors are what a client sends.

    Example:
        >>> from lightning_fedfisher.curvature import Kronecker
        >>> curvature = Kronecker(row_factor=torch.eye(2), column_factor=2 * torch.eye(3))
        >>> curvature.shape, float(curvature.trace())
        ((2, 3), 12.0)
        >>> curvature.power(0.5).power(2).apply(torch.ones(2, 3))
        tensor([[2.0000, 2.0000, 2.0000],
                [2.0000, 2.0000, 2.0000]])
    """

    kind: ClassVar[str]
    """Name of the kind in an update file, a key of `KINDS`."""
    tensor_roles: ClassVar[Mapping[str, TensorRole]] = {}
    """What each of its tensors is, by field name."""
    restricts: ClassVar[bool] = False
    """Whether its pseudo-inverse restricts curvature, which a solver holds beside the curvature."""
    elementwise: ClassVar[bool] = False
    """Whether the operator is diagonal, so that sums of operators invert entry by entry."""
    outputs_factor: ClassVar[str] = ""
    """The tensor that holds the second moment of gradients at the layer's outputs, if one does."""
    inputs_factor: ClassVar[str] = ""
    """The tensor that holds the second moment of the layer's inputs, if one alone does."""
    inputs_on: ClassVar[InputSide | None] = None
    """The side of the matrix on which the operator holds second moments of the layer's inputs.

    None if it does not hold them. EKFAC holds those of inputs weighted by their gradients.
    """
    exact_inputs: ClassVar[bool] = False
    """Whether those are the second moments themselves, neither weighted nor taken apart."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Shape ``(rows, columns)`` of the weight matrix that the operator acts on."""

    @property
    def kernel(self) -> int:
        """Elements of the kernel that the columns run over within each input channel, or 1."""
        return 1

    @abstractmethod
    def apply(self, matrix: Tensor) -> Tensor:
        """Multiplies a weight matrix by the curvature.

        Args:
            matrix: A tensor of shape ``(rows, columns)``.

        Returns:
            ``F W`` as a tensor of the same shape.
        """

    def power(
        self, exponent: float, damping: float = 0.0, inputs_exponent: float | None = None
    ) -> Self:
        """Raises the operator to a positive power; zero eigenvalues stay zero.

        Args:
            exponent: The power, greater than zero.
            damping: Part of its mean diagonal entry that is added to the diagonal of the
                `outputs_factor` before, where it is not zero.
            inputs_exponent: Power of the `inputs_factor`; None for the same.

        Returns:
            A curvature of the same kind.

        Raises:
            ValueError: If an exponent is not greater than zero.
        """
        powers, tensors = self.part_powers(exponent, damping, inputs_exponent), self.tensors()
        if all(power == (1, 0) for power in powers.values()):
            return self
        roles = self.tensor_roles
        return self.with_tensors(
            {name: tensor_power(tensors[name], roles[name], *powers[name]) for name in powers}
        )

    @classmethod
    def part_powers(
        cls, exponent: float, damping: float = 0.0, inputs_exponent: float | None = None
    ) -> dict[str, tuple[float, float]]:
        """Tells what each tensor is raised to, and damped by, for a power of the operator.

        Args:
            exponent: See `power`.
            damping: See `power`.
            inputs_exponent: See `power`.

        Returns:
            Exponent and damping by field name.

        Raises:
            ValueError: If an exponent is not greater than zero.
        """
        of_inputs = exponent if inputs_exponent is None else inputs_exponent
        require_positive_exponent(exponent)
        require_positive_exponent(of_inputs)
        return {
            name: (
                of_inputs if name == cls.inputs_factor else exponent,
                damping if name == cls.outputs_factor else 0.0,
            )
            for name in cls.tensor_roles
        }

    @abstractmethod
    def pseudo_inverse(self, rcond: float) -> PseudoInverse:
        """Prepares to solve systems with the operator where it is not singular.

        Args:
            rcond: Eigenvalues up to this fraction of the largest one count as zero. For a Kronecker
                product this holds for each factor by itself.

        Returns:
            The pseudo-inverse, with the projection onto the directions that it inverts.
        """

    @abstractmethod
    def average_over_columns(self) -> Curvature:
        """Averages over the columns, so that all weights of a row count the same.

        Returns:
            ``kron(P, I) / columns``, where ``P`` is the partial trace over the columns: a curvature
            of the same kind and trace.
        """

    def of_inputs(self) -> Curvature:
        """Takes the second moment of the layer's inputs alone, which is RegMean's curvature.

        Returns:
            The operator ``W A``, or ``A W`` where inputs are on the rows, if the kind holds the
            second moment ``A`` of the inputs. Otherwise the identity.
        """
        return Identity(self.shape)

    def with_inputs(self, change: InputMap) -> Curvature:
        """Gives the operator of the same layer behind other inputs, linear in the present ones.

        Args:
            change: The map ``S`` from the present inputs to the others.

        Returns:
            The operator ``W -> F(W S) S'``, of the same kind. It may be applied and averaged, but
            not raised to a power.

        Raises:
            TypeError: Unless the kind holds the second moments of its inputs on the columns
                (`inputs_on`).
        """
        self._refuse_inputs()

    def _refuse_inputs(self) -> NoReturn:
        """Raises the error of `with_inputs`."""
        raise TypeError(
            f"{self.kind} curvature does not hold the second moments of its inputs on its columns"
        )

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Computes the diagonal of the operator, of shape ``(rows, columns)``."""

    def trace(self) -> Tensor:
        """Computes the sum of the eigenvalues, a scalar."""
        return self.diagonal().sum()

    def eigenvalues(self) -> Tensor:
        """Computes all eigenvalues, in no particular order, of shape ``(rows, columns)``."""
        return self.diagonal()

    def norm(self) -> Tensor:
        """Computes the Frobenius norm of the operator, a scalar in float64."""
        return frobenius_norm(self.eigenvalues())

    @abstractmethod
    def sensitivities(self) -> dict[str, float]:
        """Tells how far the operator's square root moves when one of its tensors does.

        Errors are those of the square root of a factor or of eigenvalues, and of a basis itself.

        Returns:
            By field name, ``||d F^(1/2)||^2`` to first order for an error of 1 in one entry of the
            tensor, averaged over its entries.
        """

    def dense(self) -> Tensor:
        """Writes the operator out as a matrix of shape ``(rows * columns, rows * columns)``."""
        diagonal = self.diagonal()
        basis = torch.eye(diagonal.numel(), dtype=diagonal.dtype, device=diagonal.device)
        return torch.stack([self.apply(row.view(self.shape)).flatten() for row in basis], dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """Gives the tensors that define the operator, by field name."""
        return {name: getattr(self, name) for name in self.tensor_roles}

    @classmethod
    def mean(cls, curvatures: Iterable[Curvature], client_weights: Sequence[float]) -> Curvature:
        """Averages curvatures into one that can be inverted.

        Every tensor is averaged. That gives the average of the operators if the kind is linear in
        its tensors, and an approximation of it otherwise.

        Args:
            curvatures: Curvatures of this kind and one shape, gone through once, one at a time.
            client_weights: Weight of each curvature. They sum to one.

        Returns:
            The average.

        Raises:
            ValueError: If there are not as many weights as curvatures.
        """
        means: dict[str, Tensor] = {}
        for weight, curvature in zip(client_weights, curvatures, strict=True):
            shape, kernel = curvature.shape, curvature.kernel
            for name, tensor in curvature.tensors().items():
                means[name] = means.get(name, torch.zeros_like(tensor)) + weight * tensor
        return cls.from_tensors(means, shape, kernel)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], kernel: int = 1
    ) -> Self:
        """Builds an operator from its tensors.

        Args:
            tensors: Its tensors by field name, as `tensors` gives them.
            shape: Shape ``(rows, columns)`` of the weight matrix that it must act on.
            kernel: Elements of the kernel of a convolution; 1 for any other layer.

        Returns:
            A curvature of this kind.

        Raises:
            ValueError: If a tensor is missing, unknown or of the wrong shape.
        """
        expected = cls.tensor_shapes(shape, kernel)
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != expected:
            raise ValueError(
                f"{cls.kind} curvature of a {shape} matrix needs tensors of shapes {expected}, "
                f"got {found}"
            )
        return cls._build(tensors, shape)

    @classmethod
    def _build(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Self:
        """Builds an operator from tensors that were checked."""
        return cls(**tensors)

    @classmethod
    @abstractmethod
    def tensor_shapes(cls, shape: tuple[int, int], kernel: int = 1) -> dict[str, tuple[int, ...]]:
        """Gives the shape of each tensor that the operator needs.

        Args:
            shape: Shape ``(rows, columns)`` of the weight matrix.
            kernel: Elements of the kernel of a convolution; 1 for any other layer.

        Returns:
            Shapes by field name, in the order of the fields.

        Raises:
            ValueError: If the kind has no such operator.
        """

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Moves the operator to a device and floating type.

        Args:
            device: The device.
            dtype: The floating type.

        Returns:
            A curvature of the same kind.
        """
        moved = {name: tensor.to(device, dtype) for name, tensor in self.tensors().items()}
        return self.with_tensors(moved)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """Gives the same operator with other tensors in place of its own.

        Args:
            tensors: Tensors of the same shapes, by field name.

        Returns:
            A curvature of the same kind.
        """
        return replace(self, **tensors)  # type: ignore[type-var]


@dataclass(frozen=True, eq=False)
class Identity(Curvature):
    """The identity ``F W = W``, by which every weight counts the same: the curvature of FedAvg.

    Attributes:
        size: Shape ``(rows, columns)`` of the weight matrix.

    Example:
        >>> Identity((1, 2)).apply(torch.tensor([[3.0, 4.0]]))
        tensor([[3., 4.]])
    """

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
    def trace(self) -> Tensor:
        return torch.tensor(float(math.prod(self.size)), dtype=torch.float64)

    @override
    def sensitivities(self) -> dict[str, float]:
        return {}

    @classmethod
    @override
    def tensor_shapes(cls, shape: tuple[int, int], kernel: int = 1) -> dict[str, tuple[int, ...]]:
        return {}

    @classmethod
    @override
    def _build(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Self:
        return cls(shape)
