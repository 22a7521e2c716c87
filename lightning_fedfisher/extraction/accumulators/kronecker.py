"""Second moments of per-sample gradients: what is summed over samples, layer by layer.

Every class here is additive state over batches and processes, divided once at the end. The
Kronecker factors of a layer with rows ``r`` and columns ``c`` (see `operations`) are second moments
of the two sides: over positions, the side that comes from the inputs is averaged and the side that
comes from the gradient summed (Grosse & Martens, 2016, with spatially uncorrelated derivatives;
"expand" of Eschenhagen et al., 2023). A layer used several times in a forward pass has the
positions of all its uses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.curvature.kronecker import Eigenbased, EigenKronecker
from lightning_fedfisher.extraction.layer_types.base import Embedding, KroneckerLayer, Linear
from lightning_fedfisher.extraction.tracing.recorder import LayerCall
from lightning_fedfisher.layers import Layer

# Numbers unfolded at a time: few enough for a processor's cache and for no memory to speak of.
_CHUNK = 2**21
# Numbers that a processor's cache holds.
_CACHED = 2**19
# Size from which a symmetric product is worth computing by its upper blocks only.
_SMALL = 128
# Entries from which squares are added up gradient by gradient, without a copy of all of them.
_LONG = 8192
# How many times larger than its inputs and outputs a per-sample gradient may be to be written out
# once rather than every time it is needed.
_WORTH_WRITING = 8


class Accumulator(ABC):
    """Sums over samples for one layer: of the tensors that define its curvature.

    Attributes:
        sums: the state, additive over batches and processes.
    """

    def __init__(self, layer: Layer, kind: type[Curvature], like: Tensor) -> None:
        """Starts at zero.

        Args:
            layer: the layer.
            kind: of the curvature that comes of the sums.
            like: gives dtype and device.
        """
        self._kind, self._shape = kind, layer.shape
        shapes = kind.tensor_shapes(layer.shape)
        self.sums = {name: like.new_zeros(shape) for name, shape in shapes.items()}

    @abstractmethod
    def add(self, uses: Sequence[LayerCall], samples: int) -> None:
        """Adds what the backward passes through one forward pass brought.

        Args:
            uses: all uses of the layer in the forward pass that a gradient reached.
            samples: how many there are; these are all directions they have.
        """

    def finish(self, sums: Mapping[str, Tensor], count: int) -> Curvature:
        """The curvature, from sums over all processes.

        Args:
            sums: of all processes.
            count: samples over all processes.
        """
        means = {name: total / count for name, total in sums.items()}
        return self._kind.from_tensors(means, self._shape)


class GradientAccumulator(Accumulator):
    """Sums that per-sample gradients are enough for."""

    @abstractmethod
    def add_gradients(self, gradients: Tensor) -> None:
        """Adds per-sample gradients ``(samples, out, in)``, where these are what is at hand."""


class KroneckerAccumulator(Accumulator):
    """Kronecker factors of layers whose gradient is a product."""

    @override
    def add(self, uses: Sequence[LayerCall], samples: int) -> None:
        positions = sum(_positions(use) for use in uses) // samples
        for use in uses:
            operation = use.operation
            assert isinstance(operation, KroneckerLayer)
            from_inputs, from_gradient = self.sums["column_factor"], self.sums["row_factor"]
            if operation.inputs_are_rows:
                from_inputs, from_gradient = from_gradient, from_inputs
            for (piece,), n in _parts([use], samples):
                seen = operation.from_inputs(piece.inputs, n)
                _add_gram(from_inputs, seen, 1 / positions)
                _add_gram(from_gradient, operation.from_gradient(piece.gradient, n), 1.0)


class EmbeddingAccumulator(Accumulator):
    """Token frequencies, and the second moment of the gradient at an embedding's output."""

    @override
    def add(self, uses: Sequence[LayerCall], samples: int) -> None:
        positions = sum(use.inputs.numel() for use in uses) / samples
        for use in uses:
            _, tokens, gradient = _lookup(use).rows(use.inputs, use.gradient, samples)
            # Every direction looks the same tokens up.
            share = 1 / (positions * len(use.gradient))
            shares = gradient.new_full((len(tokens),), share)
            self.sums["row_values"].index_add_(0, tokens, shares)
            self.sums["column_factor"].addmm_(gradient.mT, gradient)


class DiagonalAccumulator(GradientAccumulator):
    """Sums of squared per-sample gradients, exact for every operation."""

    @override
    def add(self, uses: Sequence[LayerCall], samples: int) -> None:
        _add_squares(self.sums["values"], uses, samples)

    @override
    def add_gradients(self, gradients: Tensor) -> None:
        self.sums["values"] += _sum_of_squares(gradients)


class SpectrumAccumulator(GradientAccumulator):
    """Squared per-sample gradients in the eigenbasis of the Kronecker factors: EKFAC.

    (George et al., 2018, "Fast Approximate Natural Gradient Descent in a Kronecker-factored
    Eigenbasis", section 3.)
    """

    def __init__(self, basis: Eigenbased) -> None:
        """Starts at zero.

        Args:
            basis: the eigenbasis; its spectrum is replaced.
        """
        self._curvature = basis
        rows = basis.row_basis if isinstance(basis, EigenKronecker) else None
        self._bases = rows, basis.column_basis
        self.sums = {"spectrum": torch.zeros_like(basis.spectrum)}

    @override
    def add(self, uses: Sequence[LayerCall], samples: int) -> None:
        _add_squares(self.sums["spectrum"], uses, samples, *self._bases)

    @override
    def add_gradients(self, gradients: Tensor) -> None:
        self.sums["spectrum"] += _sum_of_squares(_turned(gradients, *self._bases))

    @override
    def finish(self, sums: Mapping[str, Tensor], count: int) -> Curvature:
        return self._curvature.with_spectrum(sums["spectrum"] / count)


class DenseAccumulator(GradientAccumulator):
    """Outer products of per-sample gradients: exact blocks, for small layers only."""

    @override
    def add(self, uses: Sequence[LayerCall], samples: int) -> None:
        for part, n in _parts(uses, samples, self._shape[0] * self._shape[1]):
            self.add_gradients(_per_sample(part, n))

    @override
    def add_gradients(self, gradients: Tensor) -> None:
        flat = gradients.flatten(1)
        self.sums["matrix"].addmm_(flat.mT, flat)


def written(uses: Sequence[LayerCall], samples: int, shape: tuple[int, int]) -> list[Tensor] | None:
    """Per-sample gradients written out, if that is worth its memory.

    Args:
        uses: of a layer.
        samples: how many there are.
        shape: of the layer's matrix.

    Returns:
        ``(samples, out, in)`` in chunks of samples; None if they are best left as they come.
    """
    if _are_vectors(uses, samples) or any(isinstance(use.operation, Embedding) for use in uses):
        return None
    entries, directions = shape[0] * shape[1], len(uses[0].gradient)
    given = sum(use.inputs.numel() + use.gradient.numel() for use in uses)
    if entries * samples * directions > _WORTH_WRITING * given:
        return None
    positions = sum(use.gradient.numel() for use in uses) // (samples * directions * shape[0])
    if isinstance(uses[0].operation, KroneckerLayer) and positions < shape[0] * directions:
        return None  # the two sides are cheaper to turn into a basis than their products
    return [_per_sample(part, n) for part, n in _parts(uses, samples, entries)]


def _sum_of_squares(gradients: Tensor) -> Tensor:
    """Over samples."""
    if gradients[0].numel() < _LONG:
        return gradients.square().sum(0)
    total = gradients[0].square()
    for gradient in gradients[1:]:
        total.addcmul_(gradient, gradient)
    return total


def _positions(use: LayerCall) -> int:
    """Positions of all samples together."""
    operation = use.operation
    assert isinstance(operation, KroneckerLayer)
    return operation.positions(use.inputs, use.gradient[0])


def _lookup(use: LayerCall) -> Embedding:
    assert isinstance(use.operation, Embedding)
    return use.operation


def _parts(
    uses: Sequence[LayerCall], samples: int, entries: int = 0
) -> Iterator[tuple[list[LayerCall], int]]:
    """The samples in chunks, so that what is unfolded on the way stays small.

    `entries` is what a sample takes beside it.
    """
    unfolded = sum(use.operation.unfolded(use.inputs, use.gradient) for use in uses)
    directions = len(uses[0].gradient)
    step = max(1, _CHUNK * samples // max(unfolded, entries * samples * directions, 1))
    for start in range(0, samples, step):
        stop = min(start + step, samples)
        yield [use.part(start, stop, samples) for use in uses], stop - start


def _per_sample(uses: Sequence[LayerCall], samples: int) -> Tensor:
    gradients = [u.operation.per_sample(u.inputs, u.gradient, samples) for u in uses]
    return torch.stack(gradients).sum(0) if len(gradients) > 1 else gradients[0]


def _add_gram(sums: Tensor, features: Tensor, scale: float) -> None:
    """Adds the second moment of ``(samples, features, positions)`` over both others."""
    size = features.shape[1]
    if features.mT.is_contiguous():
        flat = features.mT.reshape(-1, size).mT
    else:
        flat = features.transpose(0, 1).reshape(size, -1)
    if size < _SMALL or flat.shape[1] < size:
        sums.addmm_(flat, flat.mT, alpha=scale)
        return
    # Symmetric: the blocks above the diagonal tell those below.
    block = max(80, min(512, size // 4))
    for start in range(0, size, block):
        here = slice(start, start + block)
        upper = scale * (flat[here] @ flat[start:].mT)
        sums[here, start:] += upper
        sums[start + block :, here] += upper[:, block:].mT


def _add_squares(
    sums: Tensor,
    uses: Sequence[LayerCall],
    samples: int,
    row_basis: Tensor | None = None,
    column_basis: Tensor | None = None,
) -> None:
    """Adds squared per-sample gradients, in the given bases."""
    if all(isinstance(use.operation, Embedding) for use in uses):
        _add_lookup_squares(sums, uses, samples, column_basis)
        return
    entries = 0 if _are_vectors(uses, samples) else sums.numel()
    plain = isinstance(uses[0].operation, KroneckerLayer) and len(uses) == 1
    for part, n in _parts(uses, samples, 0 if plain else entries):
        (use, *others), operation = part, part[0].operation
        if not isinstance(operation, KroneckerLayer) or others:
            gradients = _per_sample(part, n)
            sums += _sum_of_squares(_turned(gradients, row_basis, column_basis))
            continue
        seen, given = operation.sides(use.inputs, use.gradient, n)
        if entries == 0:
            # A product of two vectors: its squares are the product of theirs.
            rows = given.reshape(n, len(use.gradient), -1)
            left = _into(row_basis, rows).square().sum(1)
            sums.addmm_(left.mT, _into(column_basis, seen.squeeze(2)).square())
            continue
        of_inputs, of_gradient = column_basis, row_basis
        if operation.inputs_are_rows:
            of_inputs, of_gradient = row_basis, column_basis
        if of_gradient is not None:
            each = given.reshape(n * len(use.gradient), len(of_gradient), -1)
            given = (of_gradient.mT @ each).view_as(given)
        if of_inputs is not None and given.shape[1] > given.shape[2]:
            # Fewer positions than rows: the inputs are cheaper to turn than their products.
            flat = seen.transpose(0, 1).reshape(len(of_inputs), -1)
            seen = (of_inputs.mT @ flat).view(len(of_inputs), n, -1).transpose(0, 1)
            of_inputs = None
        bases = (of_inputs, None) if operation.inputs_are_rows else (None, of_inputs)
        step = max(1, _CACHED // (entries * len(use.gradient)))
        for start in range(0, n, step):
            here = slice(start, start + step)
            gradients = operation.product(given[here], seen[here], len(use.gradient))
            sums += _sum_of_squares(_turned(gradients, *bases))


def _turned(gradients: Tensor, row_basis: Tensor | None, column_basis: Tensor | None) -> Tensor:
    """Per-sample gradients in the given bases."""
    if column_basis is not None:
        gradients = gradients @ column_basis
    if row_basis is not None:
        gradients = row_basis.mT @ gradients
    return gradients


def _are_vectors(uses: Sequence[LayerCall], samples: int) -> bool:
    """Whether a sample's gradient is the product of two vectors, and need not be written out."""
    (use, *others) = uses
    single = (
        isinstance(use.operation, Linear) and use.inputs.numel() == samples * use.inputs.shape[-1]
    )
    return single and not others


def _into(basis: Tensor | None, vectors: Tensor) -> Tensor:
    return vectors if basis is None else vectors @ basis


def _add_lookup_squares(
    sums: Tensor, uses: Sequence[LayerCall], samples: int, column_basis: Tensor | None
) -> None:
    """The same where most of a sample's gradient is zero."""
    found = [_lookup(use).rows(use.inputs, use.gradient, samples) for use in uses]
    owners, tokens, gradient = (torch.cat(parts) for parts in zip(*found, strict=True))
    keys, places = torch.unique(owners * len(sums) + tokens, return_inverse=True)
    together = gradient.new_zeros(len(keys), gradient.shape[1]).index_add_(0, places, gradient)
    sums.index_add_(0, keys % len(sums), _into(column_basis, together).square())
