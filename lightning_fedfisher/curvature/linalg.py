"""Linear algebra of symmetric positive semi-definite matrices that may be singular."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Up to so many rows, float64 costs little.
_SMALL = 256
# Of a matrix within these bounds, float32 holds the small eigenvalues as well.
_FAINTEST, _LARGEST = 1e-25, 1e25
# How well float32 has to reproduce a matrix and keep its eigenvectors orthogonal: it does to 1e-6.
_ACCURATE = 1e-5
_STRETCH = 2**16  # entries that are converted to float64 at a time
# Eigenvalues up to this fraction of the largest are rounding where float32 found them.
_FLOAT32_RCOND = 1e-4


@dataclass(frozen=True)
class Restriction:
    """Writes curvature as an operator on the coordinates of a pseudo-inverse, and what that costs.

    Costs are multiplications, of matrices with matrices alone.

    Attributes:
        write: Gives a curvature of the same kind on coordinates.
        writing: What that costs.
        changing: What it costs to map coordinates to the weight matrix and back.
        saved: What a product with the written curvature costs less than one with the curvature.
    """

    write: Callable[[Any], Any]
    writing: int
    changing: int
    saved: int


@dataclass(frozen=True)
class PseudoInverse:
    """Solves systems with an operator that may be singular, in a basis that makes it diagonal.

    Attributes:
        to_eigenbasis: Maps a weight matrix to its coordinates in an orthogonal basis.
        from_eigenbasis: Maps coordinates back to the weight matrix.
        inverse: Reciprocal of each eigenvalue, in the shape of the coordinates. Zero for those that
            count as zero.
        support: One for each eigenvalue that does not count as zero, and zero for the others.
        restriction: Writes curvature on coordinates, so that no product changes the basis; None
            where the kind cannot.

    Example:
        >>> from lightning_fedfisher.curvature import Diagonal
        >>> pseudo_inverse = Diagonal(torch.tensor([[4.0, 0.0]])).pseudo_inverse(rcond=0.0)
        >>> pseudo_inverse.solve(torch.tensor([[1.0, 1.0]]))
        tensor([[0.2500, 0.0000]])
        >>> pseudo_inverse.project(torch.tensor([[3.0, 5.0]]))
        tensor([[3., 0.]])
    """

    to_eigenbasis: Callable[[Tensor], Tensor]
    from_eigenbasis: Callable[[Tensor], Tensor]
    inverse: Tensor
    support: Tensor
    restriction: Restriction | None = None

    def solve(self, matrix: Tensor) -> Tensor:
        """Multiplies a weight matrix by the pseudo-inverse of the operator.

        Args:
            matrix: A tensor of shape ``(rows, columns)``.

        Returns:
            A tensor of the same shape.
        """
        return self.from_eigenbasis(self.inverse * self.to_eigenbasis(matrix))

    def project(self, matrix: Tensor) -> Tensor:
        """Takes the part of a weight matrix in directions that do not count as singular.

        Args:
            matrix: A tensor of shape ``(rows, columns)``.

        Returns:
            A tensor of the same shape.
        """
        return self.from_eigenbasis(self.support * self.to_eigenbasis(matrix))


def pseudo_reciprocal(values: Tensor, rcond: float) -> tuple[Tensor, Tensor]:
    """Inverts the eigenvalues that do not count as zero.

    Args:
        values: Eigenvalues, of any shape.
        rcond: Eigenvalues up to this fraction of the largest one count as zero.

    Returns:
        Two tensors of the same shape: the reciprocals, with zeros for eigenvalues that count as
        zero, and a mask of ones and zeros that tells which do not.

    Example:
        >>> pseudo_reciprocal(torch.tensor([2.0, 1e-9]), rcond=1e-6)
        (tensor([0.5000, 0.0000]), tensor([1., 0.]))
    """
    if not values.numel():
        return values, values
    support = values > rcond * values.max().clamp_min(0)
    return torch.where(support, 1 / values, 0.0), support.to(values.dtype)


def zero_small_values(values: Tensor, rcond: float) -> Tensor:
    """Sets small eigenvalues to zero.

    Args:
        values: Eigenvalues that are not negative, of shape ``(n,)``.
        rcond: Eigenvalues up to this fraction of the largest one are small.

    Returns:
        A tensor of the same shape.

    Example:
        >>> zero_small_values(torch.tensor([2.0, 0.1]), rcond=0.05)
        tensor([2., 0.])
    """
    return torch.where(values > rcond * values.max(), values, 0.0)


def large_eigenpairs(matrix: Tensor, rcond: float) -> tuple[Tensor, Tensor]:
    """Finds the eigenvalues that are not small, and their eigenvectors.

    It works in float64 where ``rcond`` asks for more than float32 can tell, and else in float32
    where that reproduces the matrix.

    Args:
        matrix: A symmetric positive semi-definite matrix, of shape ``(n, n)``.
        rcond: Eigenvalues up to this fraction of the largest one are small.

    Returns:
        The eigenvalues, of shape ``(m,)``, and the eigenvectors, of shape ``(n, m)``.

    Example:
        >>> large_eigenpairs(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), rcond=1e-3)
        (tensor([2.]), tensor([[1.],
                [0.]]))
    """
    exact = rcond < _FLOAT32_RCOND
    values, vectors = symmetric_eigendecomposition(matrix, exact=exact)
    large = values > rcond * values.max()
    return values[large], vectors[:, large]


def change_basis(matrix: Tensor, basis: Tensor) -> Tensor:
    """Writes a symmetric matrix in another basis.

    Args:
        matrix: A tensor ``M`` of shape ``(n, n)``.
        basis: Orthonormal columns ``B``, of shape ``(n, m)``.

    Returns:
        ``B' M B``, of shape ``(m, m)`` and symmetric to the bit.

    Example:
        >>> change_basis(torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([[0.0], [1.0]]))
        tensor([[3.]])
    """
    changed = basis.mT @ matrix @ basis
    return (changed + changed.mT) / 2


def symmetric_eigendecomposition(matrix: Tensor, exact: bool = True) -> tuple[Tensor, Tensor]:
    """Finds eigenvalues and eigenvectors of a symmetric positive semi-definite matrix.

    Rows and columns without any entry off the diagonal are left as they are, so that the row of an
    input that is always zero stays zero. Only eigenvalues that rounding made negative become zero:
    if small ones did as well, directions would be left in which one client resists less than
    rounding while another moves the weights.

    Args:
        matrix: A tensor of shape ``(n, n)``.
        exact: Whether to work in float64 in any case. Otherwise a large matrix of float32 is
            decomposed in float32, which is faster, unless that fails to reproduce it.

    Returns:
        The eigenvalues, of shape ``(n,)`` and not negative, and the eigenvectors, one in each
        column of a matrix of shape ``(n, n)``. Both have the dtype of the matrix.

    Example:
        >>> values, vectors = symmetric_eigendecomposition(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        >>> values, vectors
        (tensor([2., 1.]), tensor([[1., 0.],
                [0., 1.]]))
    """
    values, coupled = matrix.diagonal().double(), coupled_rows(matrix)
    if coupled.all():
        values, vectors = eigh(matrix, exact)
    else:
        vectors = torch.eye(len(matrix), dtype=values.dtype, device=values.device)
        some = coupled.nonzero().squeeze(1)
        values = values.clone()
        found, basis = eigh(matrix[some][:, some], exact)
        values[some], vectors[some.unsqueeze(1), some] = found.to(values), basis.to(vectors)
    return values.clamp_min(0).to(matrix.dtype), vectors.to(matrix.dtype)


def coupled_rows(matrix: Tensor) -> Tensor:
    """Which rows or columns have an entry off the diagonal, a mask of shape ``(n,)``."""
    if len(matrix) > 1 and matrix[0].all():  # as most are: all rows, by their first entries
        return torch.ones(len(matrix), dtype=torch.bool, device=matrix.device)
    # Either way: what a stranger sends may be symmetric up to rounding only.
    seen = (matrix != 0) | (matrix != 0).mT
    return seen.count_nonzero(dim=1) > seen.diagonal()


def eigh(matrix: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Decomposes a matrix in float64, or in float32 where that will do."""
    if not exact and takes_float32(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        if _reproduces(matrix, values, vectors):
            return values, vectors
    values, vectors = torch.linalg.eigh(matrix.double())
    return values, vectors


def takes_float32(matrix: Tensor) -> bool:
    """Whether a matrix is large enough for float32 to gain something, and not faint or huge."""
    large = matrix.dtype == torch.float32 and len(matrix) > _SMALL
    return large and _FAINTEST < float(matrix.abs().max()) < _LARGEST


def _reproduces(matrix: Tensor, values: Tensor, vectors: Tensor) -> bool:
    """Whether eigenpairs give the matrix back and are orthogonal, as a product with noise shows.

    A product with one vector of noise tells the Frobenius norm of an error well enough, and costs
    nothing beside the decomposition.
    """
    # The same noise everywhere, and no state of a generator is touched.
    noise = torch.arange(1, len(matrix) + 1, device=matrix.device, dtype=torch.float64)
    noise = (noise.square() * 0.7).cos().to(matrix.dtype)
    coordinates = vectors.mT @ noise
    error = frobenius_norm(matrix @ noise - vectors @ (values * coordinates))
    skew = frobenius_norm(noise - vectors @ coordinates)
    scale = _ACCURATE * frobenius_norm(noise)
    return bool((error <= scale * values.abs().max()) & (skew <= scale))


def symmetric_eigenvalues(matrix: Tensor) -> Tensor:
    """Finds the eigenvalues of a symmetric positive semi-definite matrix, in float64.

    Args:
        matrix: A tensor of shape ``(n, n)``.

    Returns:
        The eigenvalues in ascending order, of shape ``(n,)``. Those that rounding made negative
        are zero.
    """
    values: Tensor = torch.linalg.eigvalsh(matrix.double())
    return values.clamp_min(0).to(matrix.dtype)


def frobenius_norm(tensor: Tensor) -> Tensor:
    """Computes the root of the sum of squares, in float64, where squares do not overflow."""
    return inner_product(tensor, tensor).sqrt()


def inner_product(one: Tensor, other: Tensor) -> Tensor:
    """Computes the sum of the products of two tensors' entries, in float64.

    Args:
        one: A tensor of any shape.
        other: A tensor of the same shape.

    Returns:
        A scalar.

    Example:
        >>> inner_product(torch.tensor([1e30, 1.0]), torch.tensor([1e30, 0.0]))
        tensor(1.0000e+60, dtype=torch.float64)
    """
    # In stretches, since a copy of all in float64 leaves a processor's cache.
    stretches = (torch.split(tensor.flatten(), _STRETCH) for tensor in (one, other))
    sums = [torch.dot(a.double(), b.double()) for a, b in zip(*stretches, strict=True)]
    return torch.stack(sums).sum()


def identity_map(matrix: Tensor) -> Tensor:
    """Gives a matrix back: the change of basis of an operator that is diagonal already."""
    return matrix


def least_squares(gram: Tensor, crossed: Tensor) -> Tensor:
    """Solves a linear regression from its second moments.

    Inputs are brought to one scale first. So those of small numbers are not taken for rounding of
    those of large ones. Only those smaller than the largest by rounding in this precision (2e-16 of
    it in float64), as dead features of a network, have weights of zero.

    Args:
        gram: Second moment of the inputs, of shape ``(columns, columns)`` in float64.
        crossed: Second moment of labels and inputs, of shape ``(rows, columns)``.

    Returns:
        Weights of shape ``(rows, columns)``. Where inputs are linearly dependent, they are the
        smallest ones that fit, as multiples of the inputs' scales.

    Example:
        >>> least_squares(torch.tensor([[4.0, 0.0], [0.0, 0.0]]), torch.tensor([[8.0, 0.0]]))
        tensor([[2., 0.]])
    """
    diagonal = gram.diagonal()
    alive = diagonal > diagonal.max() * torch.finfo(gram.dtype).eps ** 2
    scale = torch.where(alive, diagonal, 1.0).rsqrt() * alive
    scaled = scale.unsqueeze(1) * gram * scale
    found: Tensor = (crossed * scale) @ torch.linalg.pinv(scaled, hermitian=True) * scale
    return found
