"""Closed-form heads by sums over clients: what is added up is all that the merge needs.

The regression of all clients' samples follows from sums over samples: of inputs times inputs, of
labels times inputs, and of squared labels. So a protocol that reveals sums alone (see `sums`) loses
nothing: the head is that of the clients' updates themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_fedfisher.curvature.input_gram import InputGram
from lightning_fedfisher.curvature.linalg import least_squares
from lightning_fedfisher.errors import UpdateError
from lightning_fedfisher.merge.methods import METHODS
from lightning_fedfisher.secure_aggregation.sums import require_sums
from lightning_fedfisher.update.client_update import ClientUpdate
from lightning_fedfisher.update.header import LeastSquaresFit
from lightning_fedfisher.update.tensor_checks import StoredRole

_ROUNDING = 1e-6  # of the labels' squares, as fixed point leaves it
_ROLES: dict[str, StoredRole] = {
    "inputs_times_inputs": "factor",
    "labels_times_inputs": "weights",
    "squared_labels": "values",
    "observations": "values",
    "samples": "values",
}


def head_sums(update: ClientUpdate) -> dict[str, Tensor]:
    """Computes what one client adds to the sums.

    Args:
        update: The client's update, of `fit_closed_form_head`.

    Returns:
        Sums over its samples in float64: ``inputs_times_inputs`` of shape ``(columns, columns)``,
        ``labels_times_inputs`` of the shape of the head's matrix, and the scalars
        ``squared_labels``, ``observations`` and ``samples``. None of them divides another entry by
        entry, so `to_fixed` takes ``divisors={}``.

    Raises:
        UpdateError: If the update is no least-squares fit.

    Example:
        >>> from lightning_fedfisher.closed_form_head import fit_closed_form_head
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> sums = head_sums(fit_closed_form_head(model, [(x, 2 * x)], likelihood="gaussian"))
        >>> [round(tensor.item(), 4) for tensor in sums.values()]
        [10.0, 20.0, 40.0, 2.0, 2.0]
    """
    fit = _require_fit(update)
    (layer,), samples = update.layers, float(update.num_samples)
    with update.opened():
        weights = update.weights(layer).double()
        gram = update.block(layer, dtype=torch.float64).tensors()["column_factor"]
    pull = weights @ gram
    squares = fit.squared_error + float((weights * pull).sum())
    return {
        "inputs_times_inputs": samples * gram,
        "labels_times_inputs": samples * pull,
        "squared_labels": torch.tensor(samples * squares, dtype=torch.float64),
        "observations": torch.tensor(samples * fit.observations, dtype=torch.float64),
        "samples": torch.tensor(samples, dtype=torch.float64),
    }


def head_from_sums(total: Mapping[str, Tensor], like: ClientUpdate) -> ClientUpdate:
    """Turns the sums of many clients into the update of one client that stands for them all.

    Args:
        total: Sum of the clients' `head_sums`, by name.
        like: Any update of the same model, for names, shapes, types and buffers; its head is not
            used.

    Returns:
        An update to merge by ``closed_form_head``, alone or with others.

    Raises:
        UpdateError: If a sum is missing, unknown, of the wrong shape, or cannot be such a sum, as
            where masks were left in it. All are named.

    Example:
        >>> from lightning_fedfisher.closed_form_head import fit_closed_form_head
        >>> x, model = torch.tensor([[1.0], [3.0]]), torch.nn.Linear(1, 1, bias=False)
        >>> update = fit_closed_form_head(model, [(x, 2 * x)], likelihood="gaussian")
        >>> both = {name: 2 * tensor for name, tensor in head_sums(update).items()}
        >>> merged = head_from_sums(both, update)
        >>> merged.num_samples, round(merged.parameters["weight"].item(), 4)
        (4, 2.0)
    """
    _require_fit(like)
    (layer,) = like.layers
    rows, columns = layer.shape
    shapes = dict[str, tuple[int, ...]](dict.fromkeys(_ROLES, ()))
    shapes |= {"inputs_times_inputs": (columns, columns), "labels_times_inputs": (rows, columns)}
    require_sums(total, shapes, _ROLES)
    means = {name: total[name].double() / total["samples"] for name in _ROLES}
    gram, crossed = means["inputs_times_inputs"], means["labels_times_inputs"]
    weights = least_squares(gram, crossed)
    squares = float(means["squared_labels"])
    error = squares - float((weights * crossed).sum())
    if error < -_ROUNDING * squares:
        reason = "squared_labels are less than what labels_times_inputs explain"
        raise UpdateError("this sum", [reason])
    tensors = {f"buffers/{name}": buffer for name, buffer in like.buffers.items()}
    for name, tensor in layer.split(weights).items():
        tensors[f"parameters/{name}"] = tensor.to(like.specs[name][1])
    (part,) = InputGram.tensor_roles
    tensors[f"curvature/{layer.name}/{part}"] = gram.contiguous()
    samples = max(round(float(total["samples"])), 1)
    header = dataclasses.replace(
        like.header,
        num_samples=samples,
        curvature_samples=samples,
        metadata={},
        quantized={},
        normalized={},
        fit=LeastSquaresFit(max(error, 0.0), float(means["observations"])),
    )
    return ClientUpdate(header, tensors, "this sum")


def _require_fit(update: ClientUpdate) -> LeastSquaresFit:
    """Refuses an update that is no least-squares fit."""
    fit = update.header.fit
    if (refusal := METHODS["closed_form_head"].refusal(update.header)) or fit is None:
        raise UpdateError(update.source, [f"it {refusal}"])
    return fit
