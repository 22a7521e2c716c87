"""Adds up squared entries of per-sample gradients, in any basis: the diagonal and EKFAC."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fedfisher.extraction.accumulators.per_sample_gradients import (
    in_chunks,
    is_outer_product,
    per_sample_gradients,
)
from lightning_fedfisher.extraction.layer_types.base import (
    KroneckerLayer,
    SparseLayer,
    are_alike,
)
from lightning_fedfisher.extraction.tracing.recorder import LayerCall

# Entries of the products that are written out at a time: 2 MB in float32, which stays in the
# second-level cache of a processor core until its squares are added up.
_CACHE_NUMEL = 2**19
# Entries of a gradient from which squares are added gradient by gradient: the copy that squaring
# all of them at once makes then costs more than the calls it saves.
_LONG_GRADIENT = 8192


def add_squared_gradients(
    sums: Tensor,
    calls: Sequence[LayerCall],
    samples: int,
    row_basis: Tensor | None = None,
    column_basis: Tensor | None = None,
) -> None:
    """Adds the squared entries of every per-sample gradient ``G``, or of ``U' G V``, to sums.

    A sample's gradient is a matrix, and its entries must be squared after everything that belongs
    to the sample has been added: positions, frames and calls of the layer. There are four ways:

    - The gradient has few rows that are not zero (`SparseLayer`): only these are squared.
    - It is the outer product of two vectors ``r c'``: its squares are ``r^2 (c^2)'``, and the
      matrix is never written out. In a basis the vectors are ``U' r`` and ``V' c``.
    - It is a sum of outer products ``R C'`` over positions (`KroneckerLayer`): either side may be
      multiplied by its basis before the product, where that is cheaper than after it.
    - Otherwise, as for a matrix that is an embedding and an output layer, it is written out, summed
      over calls and multiplied by the bases.

    Args:
        sums: Tensor of shape ``(rows, columns)`` that the squares are added to, in place.
        calls: All calls of one layer in one forward pass.
        samples: Number of samples.
        row_basis: ``U``, orthogonal, of shape ``(rows, rows)``. None stands for the identity.
        column_basis: ``V``, orthogonal, of shape ``(columns, columns)``. None stands for the
            identity.

    Example:
        >>> from lightning_fedfisher.extraction.layer_types.linear import Linear
        >>> sums = torch.zeros(1, 2)
        >>> inputs, gradients = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.full((1, 2, 1), 2.0)
        >>> add_squared_gradients(sums, [LayerCall(Linear(False), inputs, gradients)], samples=2)
        >>> sums
        tensor([[40., 80.]])
    """
    layer_type, alike = calls[0].layer_type, are_alike(call.layer_type for call in calls)
    if alike and isinstance(layer_type, SparseLayer):
        _add_squared_rows(sums, calls, samples, column_basis)
    elif is_outer_product(calls, samples):
        for (call,), n in in_chunks(calls, samples):
            _add_squared_outer_products(sums, call, n, row_basis, column_basis)
    elif isinstance(layer_type, KroneckerLayer) and len(calls) == 1:
        for (call,), n in in_chunks(calls, samples):
            _add_squared_products(sums, call, n, row_basis, column_basis)
    else:
        for chunk, n in in_chunks(calls, samples, sums.numel()):
            gradients = per_sample_gradients(chunk, n)
            sums += sum_of_squares(to_bases(gradients, row_basis, column_basis))


def sum_of_squares(gradients: Tensor) -> Tensor:
    """Adds up the squares of per-sample gradients.

    Args:
        gradients: A tensor of shape ``(samples, rows, columns)``.

    Returns:
        A tensor of shape ``(rows, columns)``.
    """
    if gradients[0].numel() < _LONG_GRADIENT:
        return gradients.square().sum(0)
    total = gradients[0].square()
    for gradient in gradients[1:]:
        total.addcmul_(gradient, gradient)
    return total


def to_bases(gradients: Tensor, row_basis: Tensor | None, column_basis: Tensor | None) -> Tensor:
    """Expresses per-sample gradients ``G`` in bases, as ``U' G V``.

    Args:
        gradients: A tensor of shape ``(samples, rows, columns)``.
        row_basis: ``U``, or None for the identity.
        column_basis: ``V``, or None for the identity.

    Returns:
        A tensor of the same shape.
    """
    if column_basis is not None:
        gradients = gradients @ column_basis
    if row_basis is not None:
        gradients = row_basis.mT @ gradients
    return gradients


def _add_squared_rows(
    sums: Tensor, calls: Sequence[LayerCall], samples: int, column_basis: Tensor | None
) -> None:
    """Adds the squares of gradients of which only some rows are not zero."""
    found = []
    for call in calls:
        assert isinstance(call.layer_type, SparseLayer)
        found.append(call.layer_type.nonzero_rows(call.inputs, call.gradients, samples))
    owners, places, entries = (torch.cat(parts) for parts in zip(*found, strict=True))
    # One number for each row of each gradient, by which rows read more than once are added up.
    keys, group = torch.unique(owners * len(sums) + places, return_inverse=True)
    rows = entries.new_zeros(len(keys), entries.shape[1]).index_add_(0, group, entries)
    sums.index_add_(0, keys % len(sums), _times(rows, column_basis).square())


def _add_squared_outer_products(
    sums: Tensor,
    call: LayerCall,
    samples: int,
    row_basis: Tensor | None,
    column_basis: Tensor | None,
) -> None:
    """Adds the squares of gradients that are outer products of two vectors each."""
    layer_type = call.layer_type
    assert isinstance(layer_type, KroneckerLayer)
    inputs, gradients = layer_type.unfold_both(call.inputs, call.gradients, samples)
    # All directions of a sample have the same input, so their squares are added first.
    rows = gradients.reshape(samples, len(call.gradients), -1)
    squared_rows = _times(rows, row_basis).square().sum(1)
    sums.addmm_(squared_rows.mT, _times(inputs.squeeze(2), column_basis).square())


def _add_squared_products(
    sums: Tensor,
    call: LayerCall,
    samples: int,
    row_basis: Tensor | None,
    column_basis: Tensor | None,
) -> None:
    """Adds the squares of gradients that are sums of outer products over positions."""
    layer_type, directions = call.layer_type, len(call.gradients)
    assert isinstance(layer_type, KroneckerLayer)
    inputs, gradients = layer_type.unfold_both(call.inputs, call.gradients, samples)
    input_basis, gradient_basis = column_basis, row_basis
    if layer_type.inputs_are_rows:
        input_basis, gradient_basis = row_basis, column_basis
    if gradient_basis is not None:
        by_direction = gradients.reshape(samples * directions, len(gradient_basis), -1)
        gradients = (gradient_basis.mT @ by_direction).view_as(gradients)
    if input_basis is not None and gradients.shape[1] > gradients.shape[2]:
        # With fewer positions than features of the gradients, multiplying the inputs by their basis
        # takes less work than multiplying the products by it.
        flat = inputs.transpose(0, 1).reshape(len(input_basis), -1)
        inputs = (input_basis.mT @ flat).view(len(input_basis), samples, -1).transpose(0, 1)
        input_basis = None
    remaining = (input_basis, None) if layer_type.inputs_are_rows else (None, input_basis)
    step = max(1, _CACHE_NUMEL // (sums.numel() * directions))
    for start in range(0, samples, step):
        here = slice(start, start + step)
        products = layer_type.outer_products(inputs[here], gradients[here], directions)
        sums += sum_of_squares(to_bases(products, *remaining))


def _times(vectors: Tensor, basis: Tensor | None) -> Tensor:
    """Expresses vectors, in the last dimension, in a basis; None stands for the identity."""
    return vectors if basis is None else vectors @ basis
