"""Eigenvalues of curvature: powers and inverses of what may be singular."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PseudoInverse:
    """How to solve with an operator that may be singular, in coordinates that make it diagonal.

    Attributes:
        to_eigenbasis: from a weight matrix to its orthogonal coordinates.
        from_eigenbasis: from coordinates to the weight matrix.
        inverse: of the eigenvalues, by coordinate; zero where they count as zero.
        support: one where they do not, and zero where they do.
    """

    to_eigenbasis: Callable[[Tensor], Tensor]
    from_eigenbasis: Callable[[Tensor], Tensor]
    inverse: Tensor
    support: Tensor

    def solve(self, matrix: Tensor) -> Tensor:
        """The pseudo-inverse times a weight matrix."""
        return self.from_eigenbasis(self.inverse * self.to_eigenbasis(matrix))

    def project(self, matrix: Tensor) -> Tensor:
        """A weight matrix's part in directions that are not singular."""
        return self.from_eigenbasis(self.support * self.to_eigenbasis(matrix))


def require_positive(exponent: float) -> None:
    """Refuses powers that are not greater than zero."""
    if not exponent > 0:
        raise ValueError(f"the power of a curvature must be greater than 0, got {exponent}")


def reciprocal(spectrum: Tensor, rcond: float) -> tuple[Tensor, Tensor]:
    """Inverts the eigenvalues that do not count as zero.

    Args:
        spectrum: of any shape.
        rcond: share of the largest up to which they do.

    Returns:
        The inverse with zeros in the other places, and ones and zeros for which is which.
    """
    support = spectrum > rcond * spectrum.max().clamp_min(0)
    return torch.where(support, 1 / spectrum, 0.0), support.to(spectrum.dtype)


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a symmetric positive semi-definite matrix.

    Only what rounding made negative is cut off. Cutting small eigenvalues as well would leave
    directions in which one client resists less than rounding and another pulls. In float64, so that
    an input that is always zero keeps a row that is. What is diagonal already is left as it is.
    """
    values = matrix.diagonal().double()
    coupled = matrix.count_nonzero(dim=1) > (values != 0)
    if coupled.all():
        values, vectors = torch.linalg.eigh(matrix.double())
    else:
        vectors = torch.eye(len(matrix), dtype=values.dtype, device=values.device)
        some = coupled.nonzero().squeeze(1)
        values = values.clone()
        values[some], vectors[some.unsqueeze(1), some] = torch.linalg.eigh(
            matrix[some][:, some].double()
        )
    return values.clamp_min(0).to(matrix.dtype), vectors.to(matrix.dtype)


def eigenvalues(matrix: Tensor) -> Tensor:
    """Eigenvalues of a symmetric positive semi-definite matrix, not negative, ascending.

    Args:
        matrix: of shape ``(n, n)``.

    Returns:
        Of shape ``(n,)``, found in float64.
    """
    values: Tensor = torch.linalg.eigvalsh(matrix.double())
    return values.clamp_min(0).to(matrix.dtype)


def frobenius(tensor: Tensor) -> Tensor:
    """Root of the sum of squares, in float64, where squares neither overflow nor vanish."""
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return norm


def symmetric_power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric positive semi-definite matrix."""
    values, vectors = eigen(matrix.double())
    return ((vectors * values.pow(exponent)) @ vectors.mT).to(matrix.dtype)


def unchanged(matrix: Tensor) -> Tensor:
    """The change of basis of an operator that is diagonal already."""
    return matrix
