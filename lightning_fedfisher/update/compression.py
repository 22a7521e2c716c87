"""Compression of an update into a number of bytes, at the least cost to the merge.

Weights and curvature are rounded to multiples of a step and coded (`integer_coding`). Of a
second-moment matrix a root is sent (`roots`), of eigenvalues their square roots. So what is rounded
has the range of the curvature's root, with which the merge works. Rounding it spares small
eigenvalues that rounding the factor itself would bury.

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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_fedfisher.curvature.registry import KINDS
from lightning_fedfisher.errors import BudgetError, FedFisherError
from lightning_fedfisher.update.file_format import file_size
from lightning_fedfisher.update.header import QuantizedTensor, UpdateHeader
from lightning_fedfisher.update.integer_coding import LARGEST, encode, encoded_size
from lightning_fedfisher.update.roots import factor_root, flatten_root, root_entries
from lightning_fedfisher.update.safetensors_layout import Spec
from lightning_fedfisher.update.tensor_checks import StoredRole

_ROUNDING_ERROR = 1 / 12  # mean squared error of rounding to integers
_OCTAVES = 32.0  # from a useless scale to one finer than float32
_GUESSES = 12  # of the scale, by sizes of samples
# Parts of the room: what a guess may be off, what is left on purpose, and what may be left if
# another coding is to be spared.
_CLOSE, _MARGIN, _SPARED = 1e-3, 2e-3, 1e-2
_CAUTION = 0.1  # of a correction, by which it errs on the small side
# Entries by which a size is estimated, in stretches as long as zlib's code for one.
_SAMPLED, _STRETCHES, _STRETCH = 2**14, 8, 2**15
# Below so many bits an entry, it is better to send fewer entries.
_FEWEST_BITS = 2.5
_WIDTHS = (math.inf, *(2.0**k for k in range(6, -6, -1)))
# What costs nothing is still sent in eight bits: other clients' curvature may see it.
_COARSEST = 127
_NEGATIVE = 1e-4  # of the largest eigenvalue: what rounding makes of zero
_LONGEST_FLOAT = 1.2345678901234567e-10  # no float takes more characters in JSON
_LONGEST = QuantizedTensor(_LONGEST_FLOAT, "bfloat16", 2**20, _LONGEST_FLOAT)


def compress(
    header: UpdateHeader, tensors: dict[str, Tensor], size: int
) -> tuple[UpdateHeader, dict[str, Tensor]]:
    """Quantizes an update so that its file is as small as wanted.

    Args:
        header: Header of the update.
        tensors: Its tensors by their names in the file, none of them quantized. The curvature is
            taken out, so that its memory is free as soon as its roots are found.
        size: Most bytes of the file.

    Returns:
        Header and tensors of the smaller update. Buffers are the same.

    Raises:
        FedFisherError: If a curvature is not positive semi-definite; all such are named.
        BudgetError: If nothing of use fits.
    """
    specs: dict[str, Spec] = {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}
    compression = Compression(header, tensors, size)
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


def fewest_bytes(header: UpdateHeader) -> int:
    """Counts the bytes without which no update can be: a bit for each entry that must be sent.

    Args:
        header: Header of the update.
    """
    return _count(header, _WIDTHS[-1]) // 8


def _bytes(count: int) -> Spec:
    """Describes a quantized tensor, which lies in the file as bytes."""
    return (count,), torch.uint8


class Compression:
    """The weights and curvature of an update, ready to be rounded."""

    def __init__(self, header: UpdateHeader, tensors: dict[str, Tensor], room: int) -> None:
        """Takes the roots of the curvature, and finds out what an error costs where.

        Args:
            header: Header of the update.
            tensors: Weights and curvature by their names in the file; others are left alone. The
                curvature is taken out.
            room: Bytes for all of them together, about.

        Raises:
            FedFisherError: If a curvature is not positive semi-definite; all such are named.
        """
        self._parts: list[_Part] = []
        energy, offenders, width = 0.0, [], _width(header, room)
        for layer in header.layers:
            kind, prefix = KINDS[header.kinds[layer.name]], f"curvature/{layer.name}/"
            factors = {part: tensors.pop(prefix + part) for part in kind.tensor_roles}
            block = kind.from_tensors(factors, layer.shape, layer.kernel)
            weights = {f"parameters/{name}": math.prod(shape) for name, shape in layer.parameters}
            count, trace = sum(weights.values()), float(block.trace().double())
            spread = sum(_sum_of_squares(tensors[name]) for name in weights) / count
            energy += spread * trace
            for name in weights:
                self._parts.append(
                    _Part(name, tensors[name].flatten(), trace / count, tensors[name].dtype)
                )
            for part, cost in block.sensitivities().items():
                name, role, tensor = prefix + part, kind.tensor_roles[part], factors[part]
                try:
                    rooted = _rooted(tensor, role, _most(len(tensor), count, width))
                except ValueError as error:
                    offenders.append(f"{name} {error}")
                    continue
                self._parts.append(_Part(name, rooted[0], spread * cost, tensor.dtype, *rooted[1:]))
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
        octaves, slope = self._guess(room)
        first = True
        while True:  # the guess is an estimate
            scale = self._scale(octaves)
            payloads = self._encoded(scale)
            size = sum(map(len, payloads.values()))
            finest = octaves <= -_OCTAVES
            if size <= room and (not first or finest or size >= (1 - _SPARED) * room):
                return {part.name: part.quantized(scale) for part in self._parts}, payloads
            if size > room and octaves >= 0:
                raise BudgetError(f"at least {size} bytes are needed, there is room for {room}")
            del payloads
            missed = (size - (1 - _MARGIN) * room) / slope
            octaves = _clipped(octaves + missed + _CAUTION * abs(missed))
            first = False

    def _guess(self, room: int) -> tuple[float, float]:
        """Guesses the octaves at which the parts take the room, and the bytes that one saves."""
        steepest = self._count / 8  # a step twice as large saves a bit an entry at most
        octaves, slope = _clipped(-room / steepest), steepest
        size = self._size(octaves)
        for _ in range(_GUESSES):
            nearer = _clipped(octaves + (size - room) / slope)
            if abs(size - room) <= _CLOSE * room or nearer == octaves:
                break
            before, size = size, self._size(nearer)
            slope = min(max((before - size) / (nearer - octaves), steepest / 16), steepest)
            octaves = nearer
        return _clipped(octaves + (size - (1 - _MARGIN) * room) / slope), slope

    def _size(self, octaves: float) -> float:
        """Estimates the bytes of all parts."""
        return sum(part.size(self._scale(octaves)) for part in self._parts)

    def _encoded(self, scale: float) -> dict[str, Tensor]:
        """Codes all parts, several at a time where there are processors for it."""

        def coded(part: _Part) -> tuple[str, Tensor]:
            return part.name, encode(part.rounded(part.entries, scale))

        if torch.get_num_threads() == 1:
            return dict(map(coded, self._parts))
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return dict(pool.map(coded, self._parts))

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
        rank: Rows of a factor's root.
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
        return max(map(abs, map(float, self.entries.aminmax()))) if len(self.entries) else 0.0

    @cached_property
    def sample(self) -> Tensor:
        """Some of the entries: from each stretch that zlib codes alike, or from some of them."""
        stretches = min(max(len(self.entries) // _STRETCH, 1), _STRETCHES)
        length = len(self.entries) // stretches
        rows = self.entries[: stretches * length].view(stretches, length)
        return rows[:, :: -(-length * stretches // _SAMPLED) or 1].contiguous()

    def step(self, scale: float) -> float:
        """Computes the step to whose multiples the entries are rounded."""
        coarse = scale / math.sqrt(self.cost) if self.cost > 0 else self.largest / _COARSEST
        coarse = min(coarse, 2 * self.largest)  # which leaves nothing but zeros already
        return max(coarse, self.largest / (LARGEST - 1)) or 1.0  # float32 may divide to one more

    def rounded(self, entries: Tensor, scale: float) -> Tensor:
        """Counts steps in each of some entries."""
        exact, step = torch.promote_types(entries.dtype, torch.float32), self.step(scale)
        flat, numbers = entries.flatten(), torch.empty(entries.numel(), dtype=torch.int32)
        for start in range(0, len(flat), _STRETCH):  # which stays in a processor's cache
            some = slice(start, start + _STRETCH)
            numbers[some] = (flat[some].to(exact) / step).round_()
        return numbers.view(entries.shape)

    def size(self, scale: float) -> float:
        """Estimates the bytes of the coded entries by some of them."""
        if not len(self.entries):
            return 0.0
        some = self.rounded(self.sample, scale)
        return encoded_size(some) * len(self.entries) / some.numel()

    def quantized(self, scale: float) -> QuantizedTensor:
        """Describes the rounding, for the header."""
        dtype = str(self.dtype).removeprefix("torch.")
        return QuantizedTensor(self.step(scale), dtype, self.rank, self.tail)


def _sum_of_squares(tensor: Tensor) -> float:
    """Adds up squares in float64, without a copy of the whole tensor."""
    flat = tensor.flatten()
    starts = range(0, len(flat), _STRETCH)
    return sum(float(flat[start : start + _STRETCH].double().square().sum()) for start in starts)


def _clipped(octaves: float) -> float:
    """Limits octaves to those between a useless scale and one finer than float32."""
    return min(max(octaves, -_OCTAVES), 0.0)


def _most(rows: int, weights: int, width: float) -> int:
    """Chooses how many rows a factor's root may have in a layer of so many weights."""
    wanted = max(int(width * weights / rows), 1) if math.isfinite(width) else rows
    return wanted if root_entries(rows, min(wanted, rows)) < root_entries(rows, rows) else rows


def _width(header: UpdateHeader, room: int) -> float:
    """Chooses how many entries a factor's root may have, as a multiple of its layer's weights."""
    fits = (width for width in _WIDTHS if 8 * room >= _FEWEST_BITS * _count(header, width))
    return next(fits, _WIDTHS[-1])


def _count(header: UpdateHeader, width: float) -> int:
    """Counts the entries of all weights and roots, if roots have so many."""
    count = 0
    for layer in header.layers:
        kind, weights = KINDS[header.kinds[layer.name]], math.prod(layer.shape)
        count += weights
        for part, shape in kind.tensor_shapes(layer.shape, layer.kernel).items():
            if kind.tensor_roles[part] == "factor":
                count += root_entries(shape[0], _most(shape[0], weights, width))
            else:
                count += math.prod(shape)
    return count


def _rooted(tensor: Tensor, role: StoredRole, most: int) -> tuple[Tensor, int, float]:
    """Computes the entries that a tensor of the curvature is sent as, their rank and the tail.

    Raises:
        ValueError: If it is not positive semi-definite up to rounding.
    """
    if role == "factor":
        root, tail = factor_root(tensor, most)
        return flatten_root(root), len(root), tail
    if role == "values":
        exact = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        smallest, largest = map(float, exact.aminmax())
        if smallest < -_NEGATIVE * max(largest, -smallest):
            raise ValueError("has negative eigenvalues")
        return exact.clamp_min(0).sqrt_().flatten(), 0, 0.0
    return tensor.flatten(), 0, 0.0
