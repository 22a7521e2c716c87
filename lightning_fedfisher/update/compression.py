"""Compression of an update into a number of bytes, at the least cost to the merge.

Weights and curvature are rounded to multiples of a step and coded (`integer_coding`). Of a
second-moment matrix ``M`` the lower triangle of its Cholesky root ``L`` is sent, of eigenvalues
their square roots. So

- symmetric factors are stored once, and come back as ``L L'``: positive semi-definite whatever the
  rounding;
- what is rounded has the range of the curvature's root, with which the merge works. Rounding it
  spares small eigenvalues that rounding the factor itself would bury.

All steps follow from one number. With ``R = F^(1/2)``, an error ``e`` in a layer's weights changes
what they contribute to the merge by ``R e``, and an error in the curvature by ``dR w``, where ``w``
is how far the client is from the merge: not known yet, and taken to be as large as its weights.
Summed over all entries, with rounding's mean squared error of ``step^2 / 12``, this is least for a
given number of bits if ``step = scale / sqrt(cost)``, with the cost of a unit error in one entry:
reverse water-filling (Cover & Thomas, Elements of Information Theory, section 10.3), over layers
and parts. The scale is the smallest that fits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_fedfisher.curvature.registry import KINDS
from lightning_fedfisher.errors import BudgetError, FedFisherError
from lightning_fedfisher.update.file_format import file_size
from lightning_fedfisher.update.header import QUANTIZED_TYPES, QuantizedTensor, UpdateHeader
from lightning_fedfisher.update.integer_coding import LARGEST, decode, encode, encoded_size
from lightning_fedfisher.update.safetensors_layout import Spec
from lightning_fedfisher.update.tensor_checks import StoredRole, value_limit

_ROUNDING_ERROR = 1 / 12  # mean squared error of rounding to integers
_OCTAVES = 32.0  # from a useless scale to one finer than float32
_CLOSE = 0.01  # octaves
_GUESSES = 40  # of the scale: each is nearer than the one before
_SAMPLED = 2**14  # entries by which a size is estimated
# Below so many bits an entry, it is better to send fewer entries.
_FEWEST_BITS = 2.5
_WIDTHS = (math.inf, *(2.0**k for k in range(6, -6, -1)))
_SMALL = 2048  # rows up to which all eigenvalues take no longer than some
# What costs nothing is still sent in eight bits: other clients' curvature may see it.
_COARSEST = 127
# What makes a second moment definite, as a multiple of its trace: more only where rounding asks it.
_FIRST_RIDGE, _LAST_RIDGE = 1e-10, 1e-4
_LONGEST_FLOAT = 1.2345678901234567e-10  # no float takes more characters in JSON
_LONGEST = QuantizedTensor(_LONGEST_FLOAT, "bfloat16", 1000, _LONGEST_FLOAT)


def compress(
    header: UpdateHeader, tensors: Mapping[str, Tensor], size: int
) -> tuple[UpdateHeader, dict[str, Tensor]]:
    """Quantizes an update so that its file is as small as wanted.

    Args:
        header: Header of the update.
        tensors: Its tensors by their names in the file, none of them quantized.
        size: Most bytes of the file.

    Returns:
        Header and tensors of the smaller update. Buffers are the same.

    Raises:
        FedFisherError: If a curvature is not positive semi-definite; all such are named.
        BudgetError: If nothing of use fits.
    """
    compression = Compression(header, tensors, size)
    specs: dict[str, Spec] = {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}
    # What the rest takes: all but the bytes of what is quantized.
    guess = dataclasses.replace(header, quantized=dict.fromkeys(compression.names, _LONGEST))
    room = size - file_size(guess, specs | {name: _bytes(0) for name in compression.names})
    while True:
        quantized, payloads = compression.fit(room)
        smaller = dataclasses.replace(header, quantized=quantized)
        sent = specs | {name: _bytes(len(payload)) for name, payload in payloads.items()}
        excess = file_size(smaller, sent) - size
        if excess <= 0:
            return smaller, {**tensors, **payloads}
        room -= excess


def _bytes(count: int) -> Spec:
    """Describes a quantized tensor, which lies in the file as bytes."""
    return (count,), torch.uint8


class Compression:
    """The weights and curvature of an update, ready to be rounded."""

    def __init__(self, header: UpdateHeader, tensors: Mapping[str, Tensor], room: int) -> None:
        """Takes the roots of the curvature, and finds out what an error costs where.

        Args:
            header: Header of the update.
            tensors: Weights and curvature by their names in the file; others are left alone.
            room: Bytes for all of them together, about.

        Raises:
            FedFisherError: If a curvature is not positive semi-definite; all such are named.
        """
        self._parts: list[_Part] = []
        energy, offenders, width = 0.0, [], _width(header, room)
        for layer in header.layers:
            kind, prefix = KINDS[header.kinds[layer.name]], f"curvature/{layer.name}/"
            weights = [f"parameters/{name}" for name in layer.parameter_names]
            parts = {part: tensors[prefix + part].double() for part in kind.tensor_roles}
            block = kind.from_tensors(parts, layer.shape, layer.kernel)
            matrix = layer.join({n.removeprefix("parameters/"): tensors[n] for n in weights})
            spread, trace = float(matrix.double().square().mean()), float(block.trace())
            energy += spread * trace
            for name in weights:
                entries, cost = tensors[name].double().flatten(), trace / matrix.numel()
                self._parts.append(_Part(name, entries, cost, tensors[name].dtype))
            for part, cost in block.sensitivities().items():
                name, tensor, role = prefix + part, parts[part], kind.tensor_roles[part]
                rank = _rank(tensor.shape, role, matrix.numel(), width)
                try:
                    entries, tail = _root(tensor, role, rank)
                except ValueError as error:
                    offenders.append(f"{name} {error}")
                    continue
                dtype = tensors[name].dtype
                self._parts.append(_Part(name, entries, spread * cost, dtype, rank, tail))
        if offenders:
            raise FedFisherError("This curvature cannot be compressed:", offenders)
        self._count = sum(len(part.entries) for part in self._parts)
        # Where rounding is expected to leave nothing of what the curvature says.
        self._useless = math.sqrt(energy / (_ROUNDING_ERROR * max(self._count, 1))) or 1.0

    @property
    def names(self) -> list[str]:
        """Names in the file of the tensors that are quantized."""
        return [part.name for part in self._parts]

    def fit(self, room: int) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
        """Rounds as finely as there is room for.

        Args:
            room: Bytes for all of them together.

        Returns:
            How each tensor was quantized, and its bytes, both by name in the file.

        Raises:
            BudgetError: If there is no room for anything of use.
        """
        octaves = -_OCTAVES
        for _ in range(_GUESSES):
            size = sum(part.size(self._scale(octaves)) for part in self._parts)
            # A step twice as large saves a bit an entry at most: this goes too far neither way.
            before = octaves
            octaves = min(max(octaves + 8 * (size - room) / self._count, -_OCTAVES), 0.0)
            if abs(octaves - before) < _CLOSE:
                break
        octaves = min(octaves + _CLOSE, 0.0)  # lest a large update is coded twice
        while True:  # those sizes were estimates
            scale = self._scale(octaves)
            payloads = {part.name: encode(part.rounded(scale)) for part in self._parts}
            size = sum(map(len, payloads.values()))
            if size <= room:
                return {part.name: part.quantized(scale) for part in self._parts}, payloads
            if octaves >= 0:
                raise BudgetError(f"at least {size} bytes are needed, there is room for {room}")
            octaves = min(octaves + _CLOSE + 8 * (size - room) / self._count, 0.0)

    def _scale(self, octaves: float) -> float:
        """Turns octaves below the useless scale, which are negative, into a scale."""
        return self._useless * float(2**octaves)


@dataclass(frozen=True)
class _Part:
    """A tensor to be rounded.

    Attributes:
        name: Name of the tensor in the file.
        entries: Entries of its root.
        cost: Cost of a unit error in one of them.
        dtype: Type of the tensor.
        rank: Columns of the root, if it is not a triangle.
        tail: Eigenvalue of what the root leaves out.
    """

    name: str
    entries: Tensor
    cost: float
    dtype: torch.dtype
    rank: int = 0
    tail: float = 0.0

    @cached_property
    def largest(self) -> float:
        """The largest absolute value."""
        return float(self.entries.abs().max())

    def step(self, scale: float) -> float:
        """Computes the step to whose multiples the entries are rounded."""
        coarse = scale / math.sqrt(self.cost) if self.cost > 0 else self.largest / _COARSEST
        return max(coarse, self.largest / LARGEST) or 1.0

    def rounded(self, scale: float, stride: int = 1) -> Tensor:
        """Counts steps in every entry, or in one of ``stride`` entries."""
        return (self.entries[::stride] / self.step(scale)).round().to(torch.int32)

    def size(self, scale: float) -> float:
        """Estimates the bytes of the coded entries by some of them."""
        stride = -(-len(self.entries) // _SAMPLED)
        some = self.rounded(scale, stride)
        return encoded_size(some) * len(self.entries) / len(some)

    def quantized(self, scale: float) -> QuantizedTensor:
        """Describes the rounding, for the header."""
        dtype = str(self.dtype).removeprefix("torch.")
        return QuantizedTensor(self.step(scale), dtype, self.rank, self.tail)


def restore(
    payload: Tensor, quantized: QuantizedTensor, shape: tuple[int, ...], role: StoredRole
) -> Tensor:
    """Restores a quantized tensor.

    Args:
        payload: Its bytes, from a stranger.
        quantized: How it was quantized.
        shape: Shape of the tensor.
        role: What the tensor is.

    Returns:
        The tensor, up to rounding.

    Raises:
        ValueError: If the bytes are not those of such a tensor, or it would be too large.
    """
    entries = decode_root(payload, quantized, shape, role)
    if role == "factor":
        if quantized.rank:
            root = entries.view(-1, quantized.rank)
        else:
            root = entries.new_zeros(shape)
            root[tuple(torch.tril_indices(*shape))] = entries
        tensor = root @ root.mT
        tensor = (tensor + tensor.mT) / 2  # a product is symmetric up to rounding
        # What no column sees is not in the tail either: it is zero.
        tensor.diagonal().add_(quantized.tail * root.any(dim=1))
    else:
        tensor = (entries.square() if role == "values" else entries).view(shape)
    return tensor.to(QUANTIZED_TYPES[quantized.dtype])


def decode_root(
    payload: Tensor, quantized: QuantizedTensor, shape: tuple[int, ...], role: StoredRole
) -> Tensor:
    """Decodes the entries of a tensor's root, and makes sure that the tensor can be used.

    Args:
        payload: Its bytes, from a stranger.
        quantized: How it was quantized.
        shape: Shape of the tensor.
        role: What the tensor is.

    Returns:
        The entries in one dimension, in at least float32.

    Raises:
        ValueError: If the bytes are not those of such a tensor, or it would be too large.
    """
    numbers = decode(payload, _entries(shape, role, quantized.rank))
    largest = float(numbers.abs().max()) * quantized.step if len(numbers) else 0.0
    if role in ("factor", "values"):
        columns = (quantized.rank or shape[0]) if role == "factor" else 1
        largest = largest * largest * columns + quantized.tail
    dtype = QUANTIZED_TYPES[quantized.dtype]
    if not largest <= (limit := value_limit(role, dtype)):
        raise ValueError(f"it holds values up to {largest:.1e}, more than {limit:.1e}")
    return numbers.to(torch.promote_types(dtype, torch.float32)) * quantized.step


def _entries(shape: Sequence[int], role: StoredRole, rank: int) -> int:
    """Counts the numbers that a tensor's root takes."""
    if role != "factor":
        return math.prod(shape)
    return shape[0] * rank if rank else shape[0] * (shape[0] + 1) // 2


def _rank(shape: Sequence[int], role: StoredRole, weights: int, width: float) -> int:
    """Chooses the columns of a factor's root in a layer of so many weights; 0 for a triangle."""
    if role != "factor":
        return 0
    rank = max(int(width * weights / shape[0]), 1) if math.isfinite(width) else shape[0]
    return rank if _entries(shape, role, rank) < _entries(shape, role, 0) else 0


def _width(header: UpdateHeader, room: int) -> float:
    """Chooses how many entries a factor's root may have, as a multiple of its layer's weights."""
    for width in _WIDTHS:
        count = 0
        for layer in header.layers:
            kind, weights = KINDS[header.kinds[layer.name]], math.prod(layer.shape)
            count += weights
            for part, shape in kind.tensor_shapes(layer.shape, layer.kernel).items():
                role = kind.tensor_roles[part]
                count += _entries(shape, role, _rank(shape, role, weights, width))
        if 8 * room >= _FEWEST_BITS * count:
            return width
    return _WIDTHS[-1]


def _root(tensor: Tensor, role: StoredRole, rank: int) -> tuple[Tensor, float]:
    """Computes the entries that a tensor of the curvature is sent as, and the tail they leave out.

    Raises:
        ValueError: If it is not positive semi-definite up to rounding.
    """
    if role == "factor":
        if tensor[tensor.diagonal() <= 0].any():
            raise ValueError("is not positive semi-definite")
        if rank:
            root, tail = _narrow_root(tensor, rank)
            return root.flatten(), tail
        return _lower_root(tensor)[tuple(torch.tril_indices(*tensor.shape))], 0.0
    if role == "values":
        if float(tensor.min()) < -_LAST_RIDGE * float(tensor.abs().max()):
            raise ValueError("has negative eigenvalues")
        return tensor.clamp_min(0).sqrt().flatten(), 0.0
    return tensor.flatten(), 0.0


def _narrow_root(matrix: Tensor, rank: int) -> tuple[Tensor, float]:
    """Computes a root of the largest eigenvalues' part, and the mean of the others."""
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
    """Computes the Cholesky root of a matrix that may be singular, with the smallest ridge.

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
