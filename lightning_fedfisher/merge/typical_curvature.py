"""What the clients' curvature of a layer is like in the median, direction by direction.

A client decides alone wherever no other has curvature, whatever its trace. So its share of the
curvature is compared with the median client's in each direction: in the eigenbasis of the clients'
mean, of each Kronecker factor by itself. Curvature with a basis of its own for each client (EKFAC)
is not compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.curvature.linalg import change_basis, symmetric_eigendecomposition
from lightning_fedfisher.merge.objective import LazyCurvatures, dot

FEWEST = 3
"""Number of clients who can judge each other: of two, the one is what the other is not."""

# Of the mean direction's share: what everybody may have where the median client has nothing.
_DAMPING = 0.1


@dataclass(frozen=True)
class TypicalCurvature:
    """The median client's curvature, in the eigenbasis of the clients' mean.

    Attributes:
        bases: For each tensor of the curvature an orthogonal basis, of shape ``(n, n)``; None for
            values, which are directions by themselves.
        shares: For each tensor the median client's part of the trace in each direction, damped, of
            shape ``(n,)`` or that of the values.
        curvature: An operator with these eigenvalues.

    Example:
        >>> from lightning_fedfisher.curvature import Diagonal
        >>> curvatures = [Diagonal(torch.tensor([[1.0, x]])) for x in (1.0, 1.0, 0.0)]
        >>> typical = TypicalCurvature.of(curvatures)
        >>> typical.shares["values"]
        tensor([[0.5500, 0.5500]])
        >>> typical.bounded(Diagonal(torch.tensor([[0.0, 8.0]])), 1.0).values
        tensor([[0.0000, 4.4000]])
    """

    bases: Mapping[str, Tensor | None]
    shares: Mapping[str, Tensor]
    curvature: Curvature

    @classmethod
    def of(cls, curvatures: Sequence[Curvature]) -> TypicalCurvature | None:
        """Finds the median client's curvature, in two passes.

        Args:
            curvatures: The curvature of each client, all of one kind.

        Returns:
            What is typical; None for kinds with bases of their own, or with nothing to compare, and
            for fewer than three clients, who cannot judge each other.
        """
        first = curvatures[0]
        roles = first.tensor_roles
        if len(curvatures) < FEWEST or not roles or "basis" in roles.values():
            return None
        means = {name: torch.zeros_like(tensor) for name, tensor in first.tensors().items()}
        for curvature in curvatures:
            for name, tensor in curvature.tensors().items():
                means[name] += tensor / _trace(tensor, roles[name] == "factor")
        if not all(mean.isfinite().all() for mean in means.values()):
            return None  # somebody is refused for it
        bases = {
            name: symmetric_eigendecomposition(mean, exact=False)[1]
            if roles[name] == "factor"
            else None
            for name, mean in means.items()
        }
        found: dict[str, list[Tensor]] = {name: [] for name in means}
        for curvature in curvatures:
            for name, tensor in curvature.tensors().items():
                if tensor.any():  # who has no curvature at all says nothing of its directions
                    found[name].append(_shares(tensor, bases[name]))
        shares = {name: _damped_median(rows, means[name]) for name, rows in found.items()}
        tensors = {
            name: share if (basis := bases[name]) is None else (basis * share) @ basis.mT
            for name, share in shares.items()
        }
        return cls(bases, shares, first.with_tensors(tensors))

    def distance(self, offset: Tensor) -> float:
        """Measures a change of the weights by what it changes in the outputs of a typical client.

        Args:
            offset: A matrix of the layer's shape.

        Returns:
            ``<V, F V>^(1/2)`` with the typical curvature ``F``, whose scale is of no meaning.
        """
        return math.sqrt(max(dot(offset, self.curvature.apply(offset)), 0.0))

    def bounded(self, curvature: Curvature, most: float) -> Curvature:
        """Bounds a client's share of its curvature in each direction by the median client's.

        Args:
            curvature: The client's curvature.
            most: Multiple of the median client's share that it may have in a direction of the
                layer's weights; of two factors, each may have its root.

        Returns:
            Curvature that is less in those directions; the very same if there are none.
        """
        tensors = curvature.tensors()
        changed = {}
        for name, tensor in tensors.items():
            shares, basis = _shares(tensor, self.bases[name]), self.bases[name]
            limits = most ** (1 / len(tensors)) * self.shares[name]
            if not (shares > limits).any():
                continue
            left = torch.where(shares > limits, limits / shares, 1.0)
            if basis is None:
                changed[name] = left * tensor
            else:
                root = (basis * left.sqrt()) @ basis.mT
                changed[name] = change_basis(tensor, root)
        return curvature.with_tensors({**tensors, **changed}) if changed else curvature

    def all_bounded(self, curvatures: Sequence[Curvature], most: float) -> Sequence[Curvature]:
        """Bounds every client's curvature, as `bounded`.

        Args:
            curvatures: The curvature of each client; bounded at each use if they are lazy.
            most: As for `bounded`.

        Returns:
            A curvature for each client; the very same sequence if all are within the bound.
        """
        if isinstance(curvatures, LazyCurvatures):
            return _Bounded(curvatures, self, most)
        found = [self.bounded(curvature, most) for curvature in curvatures]
        changed = any(new is not old for new, old in zip(found, curvatures, strict=True))
        return found if changed else curvatures


class _Bounded(LazyCurvatures):
    """Curvatures that are bounded one at a time."""

    def __init__(self, curvatures: LazyCurvatures, typical: TypicalCurvature, most: float) -> None:
        self._curvatures, self._typical, self._most = curvatures, typical, most
        self.kinds = curvatures.kinds

    @override
    def __getitem__(self, index: Any) -> Any:
        return self._typical.bounded(self._curvatures[index], self._most)


def _trace(tensor: Tensor, is_factor: bool) -> Tensor:
    """The sum of the eigenvalues of a factor or of values, not zero."""
    total = tensor.diagonal().sum() if is_factor else tensor.sum()
    return total.clamp_min(torch.finfo(tensor.dtype).tiny)


def _shares(tensor: Tensor, basis: Tensor | None) -> Tensor:
    """What part of the trace is in each direction, of shape ``(n,)`` or that of the values."""
    if basis is None:
        return tensor / _trace(tensor, is_factor=False)
    along = ((tensor @ basis) * basis).sum(0).clamp_min(0)
    return along / _trace(tensor, is_factor=True)


def _damped_median(rows: Sequence[Tensor], like: Tensor) -> Tensor:
    """The median of each direction's shares, with damping; alike everywhere if there are none."""
    if not rows:
        size = len(like) if like.dim() == 2 else like.numel()
        return torch.full_like(like.diagonal() if like.dim() == 2 else like, 1 / size)
    middle = torch.stack(list(rows)).double().quantile(0.5, dim=0).to(rows[0])
    return middle + _DAMPING / middle.numel()
