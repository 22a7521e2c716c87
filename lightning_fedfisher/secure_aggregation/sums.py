"""A merge by sums over clients, so that secure aggregation can hide every single update.

Where curvature is diagonal, the minimum of the clients' quadratics is ``sum_k p_k F_k W_k`` over
``sum_k p_k F_k``, entry by entry: nobody has to see a client to add it. A protocol that reveals
sums alone (Bonawitz et al., 2017) adds what `to_fixed` makes of a `client_sums`: integers modulo
``2**64``, where pairwise masks cancel exactly (`fixed_point`). `from_fixed` and `update_from_sums`
make a model of the sum, which is an update like any other and may be merged further, as of a
region's clients.

Not here: the protocol, with its keys, its masks and what becomes of clients that drop out. Of the
sum a server learns the merged model, the average, their curvature and buffers, and the number of
all samples. Two sums that differ by a client tell that client, and of two clients each learns the
other. A server that sees sums alone can judge nobody: a hostile client is invisible in them, and
not held to the `max_influence` of `FisherMergeModule`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_fedfisher.curvature.diagonal import Diagonal
from lightning_fedfisher.errors import UpdateError
from lightning_fedfisher.merge.methods import METHODS, MethodName
from lightning_fedfisher.update.client_update import ClientUpdate
from lightning_fedfisher.update.tensor_checks import find_problem

_BY_LAYER = ("information", "pull", "weights")


def client_sums(
    update: ClientUpdate, method: MethodName = "fisher_merge", *, sample_unit: float = 1.0
) -> dict[str, Tensor]:
    """What one client adds to the sums.

    Args:
        update: of a kind of curvature that the method works with entry by entry.
        method: name of the merge method; all clients must take the same. The published steps of
            ``fedfisher_diag`` are no sum: of it the sums give the minimum.
        sample_unit: samples that count as one. A public number as large as the largest client keeps
            the sums small, so that fixed-point numbers have room for fractions.

    Returns:
        Tensors in float64: ``share`` and ``samples``; for each layer, in the shape of its matrix,
        ``information/NAME`` (share times curvature), ``pull/NAME`` (times weights as well) and
        ``weights/NAME`` (share times weights); and ``buffers/NAME``.

    Raises:
        UpdateError: naming the layers whose curvature is not diagonal, or the method's refusal.
        ValueError: if the unit is not positive.
    """
    if not sample_unit > 0:
        raise ValueError(f"sample_unit must be greater than 0, got {sample_unit}")
    row = METHODS[method]
    if refusal := row.refusal(update.header.curvature, update.header.fisher):
        raise UpdateError(update.source, [f"it {refusal}, as method {method!r} needs"])
    samples = torch.tensor(update.num_samples / sample_unit, dtype=torch.float64)
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


def update_from_sums(
    total: Mapping[str, Tensor], like: ClientUpdate, *, sample_unit: float = 1.0
) -> ClientUpdate:
    """The clients of a sum as one client.

    Args:
        total: the sum of their `client_sums`.
        like: any update of the same model, for names, shapes and dtypes; its values are not used.
        sample_unit: of the client_sums.

    Returns:
        An update whose `parameters` are the merged model, as `FisherMergeModule` finds it, with
        diagonal curvature. Merge it by ``fisher_merge``, whatever the method was. Entries without
        information are averages, and of regions merged so averages by samples. The largest is no
        sum: counters are averages here, rounded.

    Raises:
        UpdateError: naming every sum that is missing, unknown, of the wrong shape, not finite, or
            negative where it cannot be, as it is where masks were left in it.
    """
    specs = like.specs
    buffers = {name: specs[name] for name in like.buffers}
    _require_sums(total, like, buffers)
    tensors: dict[str, Tensor] = {}
    for layer in like.layers:
        information, pull, weights = (total[f"{what}/{layer.name}"] for what in _BY_LAYER)
        matrix = torch.where(information > 0, pull / information, weights / total["share"])
        for name, tensor in layer.split(matrix).items():
            tensors[f"parameters/{name}"] = tensor.to(specs[name][1])
        # By samples, whatever the shares were: so sums of sums are sums.
        tensors[f"curvature/{layer.name}/values"] = (information / total["samples"]).contiguous()
    means = {name: total[f"buffers/{name}"] / total["samples"] for name in buffers}
    for name, mean in means.items():
        if (location := _mean_of(name)) in means:
            mean = (mean - means[location].square()).clamp_min(0)
        dtype = buffers[name][1]
        tensors[f"buffers/{name}"] = (mean if dtype.is_floating_point else mean.round()).to(dtype)
    header = dataclasses.replace(
        like.header,
        num_samples=max(round(sample_unit * float(total["samples"])), 1),
        curvature="diagonal",
        curvature_samples=0,  # nobody told
        kinds=dict.fromkeys(like.header.kinds, Diagonal.kind),
        metadata={},
        quantized={},
    )
    return ClientUpdate(header, tensors, "this sum")


def _require_sums(
    total: Mapping[str, Tensor],
    like: ClientUpdate,
    buffers: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
) -> None:
    """Refuses what can be no sum of clients of this model; names all of it at once."""
    shapes: dict[str, tuple[int, ...]] = {"share": (), "samples": ()}
    for layer in like.layers:
        shapes |= {f"{what}/{layer.name}": layer.shape for what in _BY_LAYER}
    shapes |= {f"buffers/{name}": shape for name, (shape, _) in buffers.items()}
    found = {name: tuple(tensor.shape) for name, tensor in total.items()}
    offenders = []
    for name in sorted(shapes.keys() | found.keys()):
        if shapes.get(name) != found.get(name):
            should = shapes.get(name, "absent")
            offenders.append(f"{name} should be {should}, is {found.get(name, 'absent')}")
        elif reason := find_problem(
            total[name], "values" if name.startswith("information/") else None
        ):
            offenders.append(f"{name} {reason}")
        elif name in ("share", "samples") and not total[name] > 0:
            offenders.append(f"{name} must be greater than 0")
    if offenders:
        raise UpdateError("this sum", offenders)


def _mean_of(name: str) -> str:
    """The running mean that belongs to a running variance; empty for other buffers."""
    return f"{name.removesuffix('running_var')}running_mean" if name.endswith("running_var") else ""
