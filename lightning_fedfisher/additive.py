"""A merge by sums over clients, so that secure aggregation can hide every single update.

Where curvature is diagonal, the minimum of the clients' quadratics is ``sum_k p_k F_k W_k`` over
``sum_k p_k F_k``, entry by entry: nobody has to see a client to add it. A protocol that reveals
sums alone (Bonawitz et al., 2017) adds what `to_fixed` makes of a `summand`: integers modulo
``2**64``, where pairwise masks cancel exactly. `from_fixed` and `pooled` make a model of the sum,
which is an update like any other and may be merged further, as of a region's clients.

Not here: the protocol, with its keys, its masks and what becomes of clients that drop out. A server
that sees sums alone can judge no client (`influence`), and of the sum it learns all that `pooled`
has: the merged model, its curvature and the number of all samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_fedfisher.curvature import Diagonal
from lightning_fedfisher.methods import METHODS, MethodName
from lightning_fedfisher.update import ClientUpdate
from lightning_fedfisher.update_header import UpdateError

_RING = 2.0**63  # of half of the integers, those not negative
_FAINT = 256  # steps: information up to there would be divided by what is rounding


def summand(
    update: ClientUpdate, method: MethodName = "fisher_merge", *, unit: float = 1.0
) -> dict[str, Tensor]:
    """What one client adds to the sums.

    Args:
        update: of a kind of curvature that the method works with entry by entry.
        method: name of the merge method; all clients must take the same.
        unit: samples that count as one. A public number as large as the largest client keeps the
            sums small, so that fixed-point numbers have room for fractions.

    Returns:
        Tensors in float64: ``share`` and ``samples``; for each layer, in the shape of its matrix,
        ``information/NAME`` (share times curvature), ``pull/NAME`` (times weights as well) and
        ``weights/NAME`` (share times weights); and ``buffers/NAME``.

    Raises:
        UpdateError: naming the layers whose curvature is not diagonal, or the method's refusal.
        ValueError: if the unit is not positive.
    """
    if not unit > 0:
        raise ValueError(f"unit must be greater than 0, got {unit}")
    row = METHODS[method]
    if refusal := row.refusal(update.header.curvature, update.header.fisher):
        raise UpdateError(update.source, [f"it {refusal}, as method {method!r} needs"])
    samples = torch.tensor(update.num_samples / unit, dtype=torch.float64)
    share = samples**row.share_power
    sums, offenders = {"share": share, "samples": samples}, []
    for layer in update.layers:
        curvature = row.transform(update.block(layer), False)
        if not curvature.elementwise:
            offenders.append(f"layer {layer.name} has {curvature.kind} curvature, not diagonal")
            continue
        weights, values = update.weights(layer).double(), curvature.diagonal().double()
        sums[f"information/{layer.name}"] = share * values
        sums[f"pull/{layer.name}"] = share * values * weights
        sums[f"weights/{layer.name}"] = share * weights
    if offenders:
        raise UpdateError(update.source, offenders)
    buffers = {name: buffer.double() for name, buffer in update.buffers.items()}
    for name, buffer in buffers.items():
        # Of a variance the second moment is sent: that of all clients is the sum of theirs.
        square = buffers[mean].square() if (mean := _mean_of(name)) in buffers else 0.0
        sums[f"buffers/{name}"] = samples * (buffer + square)
    return sums


def pooled(total: Mapping[str, Tensor], like: ClientUpdate, *, unit: float = 1.0) -> ClientUpdate:
    """The clients of a sum as one client.

    Args:
        total: the sum of their `summand`.
        like: any update of the same model, for names, shapes and dtypes; its values are not used.
        unit: of the summands.

    Returns:
        An update whose `parameters` are the merged model, as `FisherMergeModule` finds it, with
        diagonal curvature. Entries without information are averages. Merge it by ``fisher_merge``.
        Counters are averages here, not the largest.

    Raises:
        UpdateError: naming every sum that is missing, unknown, of the wrong shape or not finite.
    """
    shapes: dict[str, tuple[int, ...]] = {"share": (), "samples": ()}
    for layer in like.layers:
        shapes |= {f"{what}/{layer.name}": layer.shape for what in _BY_LAYER}
    forms = like.forms
    buffers = {name: forms[name] for name in like.buffers}
    shapes |= {f"buffers/{name}": shape for name, (shape, _) in buffers.items()}
    found = {name: tuple(tensor.shape) for name, tensor in total.items()}
    offenders = [
        f"{name} should be {shapes.get(name, 'absent')}, is {found.get(name, 'absent')}"
        for name in sorted(shapes.keys() | found.keys())
        if shapes.get(name) != found.get(name)
    ] or [f"{name} is not finite" for name, t in total.items() if not torch.isfinite(t).all()]
    if not offenders and not min(float(total["share"]), float(total["samples"])) > 0:
        offenders = ["share and samples must be greater than 0"]
    if offenders:
        raise UpdateError("this sum", offenders)
    tensors: dict[str, Tensor] = {}
    for layer in like.layers:
        information, pull, weights = (total[f"{what}/{layer.name}"] for what in _BY_LAYER)
        matrix = torch.where(information > 0, pull / information, weights / total["share"])
        for name, tensor in layer.split(matrix).items():
            tensors[f"parameters/{name}"] = tensor.to(forms[name][1])
        # By samples, whatever the shares were: so sums of sums are sums.
        values = (information / total["samples"]).clamp_min(0)
        tensors[f"curvature/{layer.name}/values"] = values.contiguous()
    means = {name: total[f"buffers/{name}"] / total["samples"] for name in buffers}
    for name, mean in means.items():
        if (location := _mean_of(name)) in means:
            mean = (mean - means[location].square()).clamp_min(0)
        dtype = buffers[name][1]
        tensors[f"buffers/{name}"] = (mean if dtype.is_floating_point else mean.round()).to(dtype)
    header = dataclasses.replace(
        like.header,
        num_samples=max(round(unit * float(total["samples"])), 1),
        curvature="diagonal",
        kinds=dict.fromkeys(like.header.kinds, Diagonal.kind),
        metadata={},
        packed={},
    )
    return ClientUpdate(header, tensors, "this sum")


def to_fixed(
    tensors: Mapping[str, Tensor], clients: int, fraction_bits: int = 40, words: int = 2
) -> dict[str, Tensor]:
    """Writes numbers as integers modulo ``2**64``, whose sums wrap around.

    Each entry is off by half a step of ``2**-(words * fraction_bits)`` at most, a sum by
    ``clients`` times that. The merge divides by information, so what is off must be small beside
    it: a client's entries of less than 256 steps count as no information, and rounding moves a
    weight ``W`` merged of the others by ``(1 + |W|) / 512`` at most. Clients that are certain
    leave 1e-15 and less, which two words keep; one will do for its root, as ``fedfisher`` takes.

    Args:
        tensors: a `summand`.
        clients: how many are added; their sum must fit.
        fraction_bits: bits behind the point of the first word, and of each further one.
        words: integers for each number, each going on where the one before it was rounded.

    Returns:
        Tensors of ``int64``, of shape ``(words, *shape)``; to add them modulo ``2**64`` is to add
        them.

    Raises:
        ValueError: naming the tensors that leave no room for the sum, or are not finite; or if
            there are no clients, bits or words.
    """
    if min(clients, fraction_bits, words) < 1:
        raise ValueError(
            "clients, fraction_bits and words must be at least 1, got "
            f"{clients}, {fraction_bits} and {words}"
        )
    limit = _RING / clients - clients
    faint = _FAINT * 2.0 ** -(words * fraction_bits)
    fixed, offenders = {}, []
    for name, tensor in tensors.items():
        rest = tensor.double() * 2.0**fraction_bits
        what, _, layer = name.partition("/")
        if what in ("information", "pull"):
            rest = torch.where(tensors[f"information/{layer}"] < faint, 0.0, rest)
        parts = [rest.round()]
        for _ in range(words - 1):
            rest = (rest - parts[-1]) * 2.0**fraction_bits
            parts.append(rest.round())
        stacked = torch.stack(parts)
        if stacked.numel() and not stacked.abs().max() < limit:
            offenders.append(name)
        fixed[name] = stacked.to(torch.int64)
    if offenders:
        raise ValueError(
            f"{', '.join(offenders)} hold numbers too large for {clients} clients and "
            f"{fraction_bits} fraction bits, or not finite: take fewer bits in a word and more "
            "words, or a larger unit in summand"
        )
    return fixed


def from_fixed(tensors: Mapping[str, Tensor], fraction_bits: int = 40) -> dict[str, Tensor]:
    """Reads a sum of what `to_fixed` wrote.

    Args:
        tensors: of ``int64``, and of shape ``(words, *shape)``.
        fraction_bits: as it was written with.

    Returns:
        The numbers, in float64.

    Raises:
        ValueError: naming the tensors of another type, or without words.
    """
    if odd := [n for n, t in tensors.items() if t.dtype != torch.int64 or not t.dim()]:
        raise ValueError(f"{', '.join(odd)} are not int64 of shape (words, ...), as of to_fixed")
    numbers = {}
    for name, tensor in tensors.items():
        places = -fraction_bits * torch.arange(1, len(tensor) + 1, dtype=torch.float64)
        numbers[name] = torch.tensordot(places.exp2(), tensor.double(), 1)
    return numbers


_BY_LAYER = ("information", "pull", "weights")


def _mean_of(name: str) -> str:
    """The running mean that belongs to a running variance; empty for other buffers."""
    return f"{name.removesuffix('running_var')}running_mean" if name.endswith("running_var") else ""
