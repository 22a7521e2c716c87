"""Fitting an update into a number of bytes, at the least cost to the merge.

Weights and curvature are rounded to multiples of a step and packed. Of a second-moment matrix ``M``
the lower triangle of its Cholesky root ``L`` is sent, of eigenvalues their square roots. So

- symmetric factors are stored once, and come back as ``L L'``: positive semi-definite whatever the
  rounding;
- what is rounded has the range of the curvature's root, with which the merge works. Rounding it
  spares small eigenvalues that rounding the factor itself would bury.

All steps follow from one number. With ``R = F^(1/2)``, an error ``e`` in a layer's weights changes
their pull on the merge by ``R e``, and an error in the curvature by ``dR w``, where ``w`` is how
far the client is from the merge: not known yet, and taken to be as large as its weights. Summed
over all entries, with rounding's mean squared error of ``step^2 / 12``, this is least for a given
number of bits if ``step = scale / sqrt(cost)``, with the cost of a unit error in one entry: reverse
water-filling, over layers and parts. The scale is the smallest that fits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_fedfisher.curvature.base import TensorRole
from lightning_fedfisher.curvature.registry import KINDS
from lightning_fedfisher.errors import BudgetError
from lightning_fedfisher.update.header import QUANTIZED_TYPES, QuantizedTensor, UpdateHeader
from lightning_fedfisher.update.integer_coding import LARGEST, pack, packed_size, unpack
from lightning_fedfisher.update.tensor_checks import LARGEST_VALUE

_ROUNDED = 1 / 12  # mean squared error of rounding to whole numbers
_OCTAVES = 32.0  # from a useless scale to one finer than float32
_CLOSE = 0.01  # octaves
_GUESSES = 40
_JUDGED = 2**14  # entries by which a size is estimated
# Below so many bits an entry, it is better to send fewer entries.
_FEWEST_BITS = 2.5
_WIDTHS = (math.inf, *(2.0**k for k in range(6, -6, -1)))
_SMALL = 2048  # of which all eigenvalues are at hand as quickly as some
# What costs nothing is still sent in eight bits: other clients' curvature may see it.
_COARSEST = 127
# What makes a second moment definite, as a share of its trace: more only where rounding asks it.
_FIRST_RIDGE, _LAST_RIDGE = 1e-10, 1e-4


class Compression:
    """The weights and curvature of an update, ready to be rounded."""

    def __init__(self, header: UpdateHeader, tensors: Mapping[str, Tensor], room: int) -> None:
        """Takes the roots of the curvature, and finds out what an error costs where.

        Args:
            header: of the update.
            tensors: its weights and curvature by their names in the file; others are left alone.
            room: bytes for all of them together, about.

        Raises:
            ValueError: if a curvature is not positive semi-definite; all such are named.
        """
        self._parts: list[_Part] = []
        energy, offenders, width = 0.0, [], _width(header, room)
        for layer in header.layers:
            kind, prefix = KINDS[header.kinds[layer.name]], f"curvature/{layer.name}/"
            weights = [f"parameters/{name}" for name in layer.parameter_names]
            parts = {part: tensors[prefix + part].double() for part in kind.tensor_roles}
            block = kind.from_tensors(parts, layer.shape)
            matrix = layer.join({n.removeprefix("parameters/"): tensors[n] for n in weights})
            spread, trace = float(matrix.double().square().mean()), float(block.trace())
            energy += spread * trace
            for name in weights:
                entries, cost = tensors[name].double().flatten(), trace / matrix.numel()
                self._parts.append(_Part(name, entries, cost, tensors[name].dtype))
            for part, cost in block.sensitivities().items():
                name, tensor, form = prefix + part, parts[part], kind.tensor_roles[part]
                rank = _rank(tensor.shape, form, matrix.numel(), width)
                try:
                    entries, tail = _root(tensor, form, rank)
                except ValueError as error:
                    offenders.append(f"{name} {error}")
                    continue
                dtype = tensors[name].dtype
                self._parts.append(_Part(name, entries, spread * cost, dtype, rank, tail))
        if offenders:
            raise ValueError("; ".join(offenders))
        self._count = sum(len(part.entries) for part in self._parts)
        # Where rounding is expected to leave nothing of the curvature's pull.
        self._useless = math.sqrt(energy / (_ROUNDED * max(self._count, 1))) or 1.0

    @property
    def names(self) -> list[str]:
        """The tensors that are packed, by their names in the file."""
        return [part.name for part in self._parts]

    def fit(self, room: int) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
        """Rounds as finely as there is room for.

        Args:
            room: bytes for all of them together.

        Returns:
            How each tensor was packed, and its bytes.

        Raises:
            BudgetError: if there is no room for anything of use.
        """
        octaves = -_OCTAVES
        for _ in range(_GUESSES):
            size = sum(part.size(self._scale(octaves)) for part in self._parts)
            # A step twice as large saves a bit an entry at most: this goes too far neither way.
            before = octaves
            octaves = min(max(octaves + 8 * (size - room) / self._count, -_OCTAVES), 0.0)
            if abs(octaves - before) < _CLOSE:
                break
        octaves = min(octaves + _CLOSE, 0.0)  # lest a large update is packed twice
        while True:  # those sizes were estimates
            scale = self._scale(octaves)
            payloads = {part.name: pack(part.rounded(scale)) for part in self._parts}
            size = sum(map(len, payloads.values()))
            if size <= room:
                return {part.name: part.packed(scale) for part in self._parts}, payloads
            if octaves >= 0:
                raise BudgetError(f"at least {size} bytes are needed, there is room for {room}")
            octaves = min(octaves + _CLOSE + 8 * (size - room) / self._count, 0.0)

    def _scale(self, octaves: float) -> float:
        return self._useless * float(2**octaves)


@dataclass(frozen=True)
class _Part:
    """A tensor to be rounded.

    Attributes:
        name: in the file.
        entries: of its root.
        cost: of a unit error in one of them.
        dtype: of the tensor.
        rank: columns of the root, if it is not a triangle.
        tail: eigenvalue of what it leaves out.
    """

    name: str
    entries: Tensor
    cost: float
    dtype: torch.dtype
    rank: int = 0
    tail: float = 0.0

    @cached_property
    def largest(self) -> float:
        """The largest entry, in size."""
        return float(self.entries.abs().max())

    def step(self, scale: float) -> float:
        """What the entries are rounded to multiples of."""
        coarse = scale / math.sqrt(self.cost) if self.cost > 0 else self.largest / _COARSEST
        return max(coarse, self.largest / LARGEST) or 1.0

    def rounded(self, scale: float, stride: int = 1) -> Tensor:
        """The entries in steps, or some of them."""
        return (self.entries[::stride] / self.step(scale)).round().to(torch.int32)

    def size(self, scale: float) -> float:
        """Bytes that they will take, judged by some of them."""
        stride = -(-len(self.entries) // _JUDGED)
        some = self.rounded(scale, stride)
        return packed_size(some) * len(self.entries) / len(some)

    def packed(self, scale: float) -> QuantizedTensor:
        """What the file tells of it."""
        dtype = str(self.dtype).removeprefix("torch.")
        return QuantizedTensor(self.step(scale), dtype, self.rank, self.tail)


def restore(
    payload: Tensor, packed: QuantizedTensor, shape: tuple[int, ...], form: TensorRole
) -> Tensor:
    """Undoes the packing of one tensor.

    Args:
        payload: its bytes, from a stranger.
        packed: how it was packed.
        shape: it had.
        form: what it is; a weight is as a basis.

    Returns:
        The tensor, up to rounding.

    Raises:
        ValueError: if the bytes are not those of such a tensor, or it would be too large.
    """
    entries = check(payload, packed, shape, form)
    if form == "factor":
        if packed.rank:
            root = entries.view(-1, packed.rank)
        else:
            root = entries.new_zeros(shape)
            root[tuple(torch.tril_indices(*shape))] = entries
        tensor = root @ root.mT
        tensor = (tensor + tensor.mT) / 2  # a product is symmetric up to rounding
        # What no column sees is not in the tail either: it is zero.
        tensor.diagonal().add_(packed.tail * root.any(dim=1))
    else:
        tensor = (entries.square() if form == "values" else entries).view(shape)
    return tensor.to(QUANTIZED_TYPES[packed.dtype])


def check(
    payload: Tensor, packed: QuantizedTensor, shape: tuple[int, ...], form: TensorRole
) -> Tensor:
    """Unpacks the entries of a tensor's root and finds out that the tensor would be sound.

    Args:
        payload: its bytes, from a stranger.
        packed: how it was packed.
        shape: it had.
        form: what it is; a weight is as a basis.

    Returns:
        The entries in one dimension, in at least float32.

    Raises:
        ValueError: if the bytes are not those of such a tensor, or it would be too large.
    """
    numbers = unpack(payload, _entries(shape, form, packed.rank))
    largest = float(numbers.abs().max()) * packed.step if len(numbers) else 0.0
    if form != "basis":
        columns = (packed.rank or shape[0]) if form == "factor" else 1
        largest = largest * largest * columns + packed.tail
    dtype = QUANTIZED_TYPES[packed.dtype]
    if not largest <= (most := min(torch.finfo(dtype).max, LARGEST_VALUE)):
        raise ValueError(f"it holds values up to {largest:.1e}, more than {most:.1e}")
    return numbers.to(torch.promote_types(dtype, torch.float32)) * packed.step


def _entries(shape: Sequence[int], form: TensorRole, rank: int) -> int:
    """Numbers that a tensor's root takes."""
    if form != "factor":
        return math.prod(shape)
    return shape[0] * rank if rank else shape[0] * (shape[0] + 1) // 2


def _rank(shape: Sequence[int], form: TensorRole, weights: int, width: float) -> int:
    """Columns of a factor's root in a layer of so many weights; 0 for all, as a triangle."""
    if form != "factor":
        return 0
    rank = max(int(width * weights / shape[0]), 1) if math.isfinite(width) else shape[0]
    return rank if _entries(shape, form, rank) < _entries(shape, form, 0) else 0


def _width(header: UpdateHeader, room: int) -> float:
    """Entries that a factor's root may have, in multiples of its layer's weights."""
    for width in _WIDTHS:
        count = 0
        for layer in header.layers:
            kind, weights = KINDS[header.kinds[layer.name]], math.prod(layer.shape)
            count += weights
            for part, shape in kind.tensor_shapes(layer.shape).items():
                form = kind.tensor_roles[part]
                count += _entries(shape, form, _rank(shape, form, weights, width))
        if 8 * room >= _FEWEST_BITS * count:
            return width
    return _WIDTHS[-1]


def _root(tensor: Tensor, form: TensorRole, rank: int) -> tuple[Tensor, float]:
    """Entries of what a tensor of the curvature is sent as, and what they leave out.

    Raises:
        ValueError: if it is not positive semi-definite up to rounding.
    """
    if form == "factor":
        if tensor[tensor.diagonal() <= 0].any():
            raise ValueError("is not positive semi-definite")
        if rank:
            root, tail = _narrow_root(tensor, rank)
            return root.flatten(), tail
        return _lower_root(tensor)[tuple(torch.tril_indices(*tensor.shape))], 0.0
    if form == "values":
        if float(tensor.min()) < -_LAST_RIDGE * float(tensor.abs().max()):
            raise ValueError("has negative eigenvalues")
        return tensor.clamp_min(0).sqrt().flatten(), 0.0
    return tensor.flatten(), 0.0


def _narrow_root(matrix: Tensor, rank: int) -> tuple[Tensor, float]:
    """A root of the largest eigenvalues' part, the others being their mean: of the same trace."""
    if len(matrix) <= _SMALL:
        values, vectors = torch.linalg.eigh(matrix)
        values, vectors = values[-rank:], vectors[:, -rank:]
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # The leading directions, to which float32 will do.
            vectors, values, _ = torch.svd_lowrank(matrix.float(), rank, niter=2)
        vectors, values = vectors.double(), values.double()
    seen = int((matrix.diagonal() > 0).sum())
    rest = float(matrix.trace() - values.sum())
    tail = max(rest / max(seen - rank, 1), 0.0)
    return vectors * (values - tail).clamp_min(0).sqrt(), tail


def _lower_root(matrix: Tensor) -> Tensor:
    """Cholesky's root of a matrix that may be singular, with a ridge as small as will do.

    What is zero, as for inputs that always are, stays zero.
    """
    seen = (matrix.diagonal() > 0).nonzero().squeeze(1)
    whole = len(seen) == len(matrix)
    some = matrix.clone() if whole else matrix[seen][:, seen]
    diagonal = some.diagonal().clone()
    ridge = _FIRST_RIDGE
    while ridge <= _LAST_RIDGE:
        some.diagonal().copy_(diagonal + ridge * diagonal.sum())
        found, failed = torch.linalg.cholesky_ex(some)
        if not failed:
            root = found if whole else torch.zeros_like(matrix)
            if not whole:
                root[seen.unsqueeze(1), seen] = found
            return root
        ridge *= 10
    raise ValueError("is not positive semi-definite")
