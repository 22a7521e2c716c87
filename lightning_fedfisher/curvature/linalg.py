"""Linear algebra of symmetric positive semi-definite matrices that may be singular."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_fedfisher.curvature.low_rank import pivoted_root

# Up to so many rows, float64 costs little more.
_SMALL = 1024
# Leading eigenpairs that are looked for, passes in float32 and float64, and how exact they must be.
_LEADING, _ROUGH_PASSES, _PASSES, _CONVERGED = 32, 12, 4, 1e-10
# Of a matrix within these bounds, float32 holds the small eigenvalues as well.
_FAINTEST, _LARGEST = 1e-25, 1e25
# How well float32 has to reproduce a matrix and keep its eigenvectors orthogonal: it does to 1e-6.
_ACCURATE = 1e-5
_STRETCH = 2**16  # entries that are converted to float64 at a time
# Rows from which a matrix may be worth a root of at most such a part of them, and what that may
# leave.
_WIDE, _NARROW, _LEFT = 512, 0.6, 1e-6
# Eigenvalues up to this fraction of the largest are rounding where float32 found them.
_FLOAT32_RCOND = 1e-4


@dataclass(frozen=True)
class PseudoInverse:
    """Solves systems with an operator that may be singular, in a basis that makes it diagonal.

    Attributes:
        to_eigenbasis: Maps a weight matrix to its coordinates in an orthogonal basis.
        from_eigenbasis: Maps coordinates back to the weight matrix.
        inverse: Reciprocal of each eigenvalue, in the shape of the coordinates. Zero for those that
            count as zero.
        support: One for each eigenvalue that does not count as zero, and zero for the others.
        restrict: Gives a curvature of the same kind as an operator on coordinates, where that is
            cheaper than a change of basis at each product; None where it is not.

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
    restrict: Callable[[Any], Any] | None = None

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


def require_positive_exponent(exponent: float) -> None:
    """Refuses powers that are not greater than zero.

    Args:
        exponent: The power.

    Raises:
        ValueError: If it is zero, negative or not a number.
    """
    if not exponent > 0:
        raise ValueError(f"the power of a curvature must be greater than 0, got {exponent}")


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
    values, coupled = matrix.diagonal().double(), _coupled(matrix)
    if coupled.all():
        values, vectors = _eigh(matrix, exact)
    else:
        vectors = torch.eye(len(matrix), dtype=values.dtype, device=values.device)
        some = coupled.nonzero().squeeze(1)
        values = values.clone()
        found, basis = _eigh(matrix[some][:, some], exact)
        values[some], vectors[some.unsqueeze(1), some] = found.to(values), basis.to(vectors)
    return values.clamp_min(0).to(matrix.dtype), vectors.to(matrix.dtype)


def _coupled(matrix: Tensor) -> Tensor:
    """Which rows or columns have an entry off the diagonal, a mask of shape ``(n,)``."""
    if len(matrix) > 1 and matrix[0].all():  # as most are: all rows, by their first entries
        return torch.ones(len(matrix), dtype=torch.bool, device=matrix.device)
    # Either way: what a stranger sends may be symmetric up to rounding only.
    seen = (matrix != 0) | (matrix != 0).mT
    return seen.count_nonzero(dim=1) > seen.diagonal()


def _eigh(matrix: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Decomposes a matrix in float64, or in float32 where that will do."""
    if not exact and _takes_float32(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        if _reproduces(matrix, values, vectors):
            return values, vectors
    values, vectors = torch.linalg.eigh(matrix.double())
    return values, vectors


def _takes_float32(matrix: Tensor) -> bool:
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


def symmetric_power(matrix: Tensor, exponent: float) -> Tensor:
    """Raises a symmetric positive semi-definite matrix to a positive power.

    Large matrices of float32 are decomposed in float32 (see `symmetric_eigendecomposition`).

    Args:
        matrix: A tensor of shape ``(n, n)``.
        exponent: The power; 0.5 gives the square root.

    Returns:
        A tensor of the same shape.

    Example:
        >>> symmetric_power(torch.tensor([[4.0, 0.0], [0.0, 9.0]]), 0.5)
        tensor([[2., 0.],
                [0., 3.]])
    """
    coupled = _coupled(matrix)
    if not coupled.all():
        some = coupled.nonzero().squeeze(1)
        power = matrix.diagonal().double().clamp_min(0).pow(exponent).to(matrix.dtype).diag()
        power[some.unsqueeze(1), some] = symmetric_power(matrix[some][:, some], exponent)
        return power
    if (root := _narrow_root(matrix)) is not None:
        return _power_of_root(root, exponent, matrix.dtype)
    if not _takes_float32(matrix):
        return _power(*symmetric_eigendecomposition(matrix.double()), exponent).to(matrix.dtype)
    # Rounding goes by the largest eigenvalues, and its root by the root of them. So these few are
    # taken out before, which leaves the small ones their digits.
    exact = matrix.double()
    leading, vectors = _leading_eigenpairs(exact)
    rest = (exact - (vectors * leading) @ vectors.mT).to(matrix.dtype)
    values, others = symmetric_eigendecomposition(rest, exact=False)
    others = others - vectors.to(others) @ (vectors.to(others).mT @ others)
    power = _power(leading, vectors, exponent).to(matrix.dtype)
    return power + _power(values, others, exponent)


def _narrow_root(matrix: Tensor) -> Tensor | None:
    """Finds a root of few rows in float64; None if it takes too many to pay."""
    most = int(_NARROW * len(matrix))
    if len(matrix) < _WIDE or not (matrix.diagonal() > 0).all():
        return None
    root, left = pivoted_root(matrix, most)
    return root if len(root) < most and left <= _LEFT else None


def _power_of_root(root: Tensor, exponent: float, dtype: torch.dtype) -> Tensor:
    """Raises ``U' U`` to a power by what is as large as the rank."""
    largest = root.abs().max()  # by which squares neither overflow nor vanish in float32
    root = root / largest
    # The rows along U's left singular vectors tell singular values better than they were found.
    _, vectors = _eigh(root @ root.mT, exact=True)
    rows = vectors.to(dtype).mT @ root.to(dtype)
    squares = rows.square().sum(1, keepdim=True)
    half = rows * torch.where(squares > 0, squares, 1.0).pow((exponent - 1) / 2)
    return (half.mT @ half).mul_(float(largest) ** (2 * exponent))


def _power(values: Tensor, vectors: Tensor, exponent: float) -> Tensor:
    """Multiplies out the power of a matrix that is written by eigenpairs."""
    half = vectors * values.pow(exponent / 2)
    return half @ half.mT


def _leading_eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Finds a few of the largest eigenvalues, by subspace iteration, and none that is inexact."""
    seeds = torch.arange(1, _LEADING * len(matrix) + 1).to(matrix).view(-1, _LEADING)
    basis = torch.linalg.qr((seeds.square() * 0.7).cos()).Q
    for dtype, passes in ((torch.float32, _ROUGH_PASSES), (matrix.dtype, _PASSES)):
        rounded, basis = matrix.to(dtype), basis.to(dtype)
        for _ in range(passes):
            basis = torch.linalg.qr(rounded @ basis).Q
    product = matrix @ basis
    values, turn = torch.linalg.eigh(basis.mT @ product)
    vectors = basis @ turn
    error = torch.linalg.vector_norm(product @ turn - vectors * values, dim=0)
    exact = (error <= _CONVERGED * values[-1]) & (values > 0)
    return values[exact], vectors[:, exact]


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
