"""A merge by sums over clients, so that secure aggregation can hide every single update.

Where curvature is diagonal, the minimum of the clients' quadratics is ``sum_k p_k F_k W_k`` over
``sum_k p_k F_k``, entry by entry: nobody has to see a client to add it. A protocol that reveals
sums alone (Bonawitz et al., 2017) adds what `to_fixed` makes of `client_sums`: integers modulo
``2**64``, where pairwise masks cancel exactly. `from_fixed` and `update_from_sums` make a model of
the sum. It is an update like any other and may be merged further, for example as the update of a
region's clients.

The protocol is not here: its keys, its masks, and what becomes of clients that drop out. From a sum
a server learns the merged model, the average, their curvature and buffers, and the number of all
samples. Two sums that differ by one client reveal that client, and of two clients each learns the
other. A server that sees only sums cannot judge clients: a hostile client is invisible in them, and
the `max_influence` of `FisherMergeModule` does not hold it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_fedfisher.curvature.diagonal import Diagonal
from lightning_fedfisher.errors import UpdateError
from lightning_fedfisher.merge.methods import METHODS
from lightning_fedfisher.update.buffer_roles import variance_partner
from lightning_fedfisher.update.client_update import ClientUpdate
from lightning_fedfisher.update.safetensors_layout import Spec
from lightning_fedfisher.update.tensor_checks import StoredRole, find_problem

_INFORMATION, _INFORMATION_TIMES_WEIGHTS, _WEIGHTS = (
    "information/",
    "information_times_weights/",
    "weights/",
)
_COUNTS = ("client_weight", "samples", "observations")  # greater than zero
_BY_LAYER = (_INFORMATION, _INFORMATION_TIMES_WEIGHTS, _WEIGHTS)


def client_sums(
    update: ClientUpdate, method: str = "fisher_merge", *, sample_unit: float = 1.0
) -> dict[str, Tensor]:
    """Computes what one client adds to the sums.

    Args:
        update: The client's update. Its kind of curvature must be one that the method works with
            entry by entry.
        method: Name of the merge method; all clients must take the same. The published steps of
            ``fedfisher_diag`` are no sum: the sums give the minimum to which those steps lead.
        sample_unit: Number of samples that count as one. A public number as large as the largest
            client's keeps the sums small, so that fixed-point numbers have room for fractions.

    Returns:
        Tensors in float64. ``client_weight`` and ``samples`` are scalars. For each layer, in the
        shape of its matrix, ``information/NAME`` is the client weight times the curvature,
        ``information_times_weights/NAME`` is that times the weights, and ``weights/NAME`` is the
        client weight times the weights. ``buffers/NAME`` is the number of samples times the buffer,
        or times the second moment where the buffer is a running variance.

    Raises:
        UpdateError: If the curvature of a layer is not diagonal, or the method refuses the update.
            All such layers are named.
        ValueError: If the unit is not positive.

    Example:
        >>> from lightning_fedfisher.layers import find_layers
        >>> from lightning_fedfisher.update import UpdateHeader
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> torch.nn.init.constant_(model.weight, 3.0).shape
        torch.Size([1, 2])
        >>> (layer,) = find_layers(model)
        >>> kinds = {layer.name: "diagonal"}
        >>> header = UpdateHeader(4, "diagonal", "exact", "categorical", 4, (layer,), kinds)
        >>> blocks = {layer.name: Diagonal(torch.full((1, 2), 0.5))}
        >>> sums = client_sums(ClientUpdate.from_model(model, header, blocks))
        >>> sums["samples"], sums["information_times_weights/weight"]
        (tensor(4., dtype=torch.float64), tensor([[6., 6.]], dtype=torch.float64))
    """
    if not sample_unit > 0:
        raise ValueError(f"sample_unit must be greater than 0, got {sample_unit}")
    row = METHODS[method]
    if refusal := row.refusal(update.header):
        raise UpdateError(update.source, [f"it {refusal}, as method {method!r} needs"])
    samples = torch.tensor(update.num_samples / sample_unit, dtype=torch.float64)
    client_weight = samples**row.client_weight_power
    sums, offenders = {"client_weight": client_weight, "samples": samples}, []
    with update.opened():
        for layer in update.layers:
            curvature = row.transformed(update.block(layer))
            if not curvature.elementwise:
                offenders.append(f"layer {layer.name} has {curvature.kind} curvature, not diagonal")
                continue
            weights, values = update.weights(layer).double(), curvature.diagonal().double()
            sums[_INFORMATION + layer.name] = client_weight * values
            sums[_INFORMATION_TIMES_WEIGHTS + layer.name] = client_weight * values * weights
            sums[_WEIGHTS + layer.name] = client_weight * weights
        buffers = {name: buffer.double() for name, buffer in update.buffers.items()}
    if offenders:
        raise UpdateError(update.source, offenders)
    for name, buffer in buffers.items():
        # Of a variance the second moment is sent: that of all clients is the sum of theirs.
        square = buffers[mean].square() if (mean := variance_partner(name)) in buffers else 0.0
        sums[f"buffers/{name}"] = samples * (buffer + square)
    return sums


def divisors(sums: Iterable[str]) -> dict[str, str]:
    """Tells which sums the merge divides by which, as `to_fixed` needs to know.

    Args:
        sums: Names of the sums of `client_sums`, or the sums themselves.

    Returns:
        The name of the divisor, by name of the sum that is divided by it. A layer's information
        divides ``information_times_weights/NAME``, and stands for itself as well.

    Example:
        >>> divisors(["samples", "weights/conv", "information_times_weights/conv"])
        {'information_times_weights/conv': 'information/conv'}
    """
    return {
        name: _INFORMATION + name.removeprefix(group)
        for name in sums
        for group in (_INFORMATION, _INFORMATION_TIMES_WEIGHTS)
        if name.startswith(group)
    }


def update_from_sums(
    total: Mapping[str, Tensor], like: ClientUpdate, *, sample_unit: float = 1.0
) -> ClientUpdate:
    """Turns the sums of many clients into the update of one client that stands for them all.

    Args:
        total: Sum of the clients' `client_sums`, by name.
        like: Any update of the same model, for names, shapes and dtypes; its values are not used.
        sample_unit: Number of samples that count as one, as given to `client_sums`.

    Returns:
        An update whose `parameters` are the merged model, as `FisherMergeModule` finds it, with
        diagonal curvature. Merge it by ``fisher_merge``, whatever the method was. Entries without
        information are averages, and of regions merged so averages by samples. Counters are rounded
        averages here: the largest counter is no sum.

    Raises:
        UpdateError: If a sum is missing, unknown, of the wrong shape, not finite, or negative where
            it cannot be, as it is where masks were left in it. All are named.

    Example:
        >>> from lightning_fedfisher.layers import find_layers
        >>> from lightning_fedfisher.update import UpdateHeader
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> (layer,) = find_layers(model)
        >>> kinds = {layer.name: "diagonal"}
        >>> header = UpdateHeader(4, "diagonal", "exact", "categorical", 4, (layer,), kinds)
        >>> blocks = {layer.name: Diagonal(torch.full((1, 2), 0.5))}
        >>> update = ClientUpdate.from_model(model, header, blocks)
        >>> sums = client_sums(update)
        >>> merged = update_from_sums({name: 2 * both for name, both in sums.items()}, update)
        >>> merged.num_samples, torch.allclose(merged.parameters["weight"], model.weight)
        (8, True)
    """
    specs = like.specs
    buffers = {n: spec for n, spec in specs.items() if n not in _parameter_names(like)}
    roles: dict[str, StoredRole] = {_INFORMATION + layer.name: "values" for layer in like.layers}
    require_sums(total, _shapes(like, buffers), roles)
    tensors: dict[str, Tensor] = {}
    for layer in like.layers:
        information, weighted, weights = (total[group + layer.name] for group in _BY_LAYER)
        average = weights / total["client_weight"]
        matrix = torch.where(information > 0, weighted / information, average)
        for name, tensor in layer.split(matrix).items():
            tensors[f"parameters/{name}"] = tensor.to(specs[name][1])
        # By samples, whatever the client weights were: so sums of sums are sums.
        tensors[f"curvature/{layer.name}/values"] = (information / total["samples"]).contiguous()
    means = {name: total[f"buffers/{name}"] / total["samples"] for name in buffers}
    for name, mean in means.items():
        if (location := variance_partner(name)) in means:
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
        normalized={},  # no means of inputs are summed
    )
    return ClientUpdate(header, tensors, "this sum")


def _parameter_names(update: ClientUpdate) -> set[str]:
    """Lists the trained parameters of all layers."""
    return {name for layer in update.layers for name in layer.parameter_names}


def _shapes(like: ClientUpdate, buffers: Mapping[str, Spec]) -> dict[str, tuple[int, ...]]:
    """The shape of each sum of clients of a model."""
    shapes: dict[str, tuple[int, ...]] = {"client_weight": (), "samples": ()}
    for layer in like.layers:
        shapes |= {group + layer.name: layer.shape for group in _BY_LAYER}
    return shapes | {f"buffers/{name}": shape for name, (shape, _) in buffers.items()}


def require_sums(
    total: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    roles: Mapping[str, StoredRole],
) -> None:
    """Refuses what can be no sum of clients.

    Args:
        total: The sums by name.
        shapes: The shape of each.
        roles: What sums must be of which more is known than that, by name.

    Raises:
        UpdateError: If one is missing, unknown, of the wrong shape or cannot be; all are named.
    """
    offenders = []
    for name in sorted(shapes.keys() | total.keys()):
        should = shapes.get(name, "absent")
        found = tuple(total[name].shape) if name in total else "absent"
        if should != found:
            offenders.append(f"{name} should be {should}, is {found}")
        elif reason := find_problem(total[name], roles.get(name)):
            offenders.append(f"{name} {reason}")
        elif name in _COUNTS and not total[name] > 0:
            offenders.append(f"{name} must be greater than 0")
    if offenders:
        raise UpdateError("this sum", offenders)
