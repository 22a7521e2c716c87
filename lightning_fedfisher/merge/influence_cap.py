"""What one client weighs in a merge: measured in every layer, and bounded.

**Threat model.** The server is honest but curious, clients are strangers, and files may be
anybody's.

*What the server learns of a client*: everything in its update. The weights themselves, from which
images have been reconstructed where models are small or overfitted; the second moments of each
layer's inputs and gradients, the first of them those of the data; the number of samples; in the
running statistics of normalisation, per-channel means of its features. Nothing of this is noised,
and there is no differential privacy. A diagonal merge can do without seeing any single update:
`additive` has the sums for secure aggregation.

*What a file can do*: nothing but be refused. It is never unpickled or executed, all in it is
checked before it is used and what it unpacks to is bounded before it is allocated (`update_file`,
`packing`, `update`).

*What a client can do* with a valid file: send wrong weights, or ask for a weight in the merge that
is not its due, by its curvature or its number of samples. It is judged by the median client, in
every layer: by its information ``p_k tr F_k``, by the distance of its weights from the median
weights, and by its pull ``p_k ||F_k (W_k - W_median)||``. What exceeds ``max_influence`` times the
median client's is reduced to it, by a smaller share or by weights drawn towards the median weights.
Clients within the bound are left as they are, to the bit; those beyond what is usual are named, as
they are by ``fedfisher verify``.

*What remains*: a client within the bound may still lie, as one trained on wrong labels or with a
backdoor does. It decides alone in directions that no other client has information on. Half of the
clients decide the median. One or two clients cannot be judged by others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fedfisher.merge.objective import Quadratic, norm

MEASURES = ("information", "distance", "pull")
"""The columns of what `measure` returns."""

USUAL = 10.0
"""Times what the median client weighs: twice the most that any client of 27 federations did."""

_AT_ONCE = 2**22  # entries of which a median is taken


def measure(problem: Quadratic) -> Tensor:
    """What each client weighs in one layer, in one pass over the curvatures.

    Args:
        problem: the layer's.

    Returns:
        Multiples of the median client's, of shape ``(clients, 3)`` and in float64: `MEASURES`.
        Zeros have no part in a median. Infinite where float32 overflows.
    """
    middle = median(problem.weights)
    rows = []
    for share, weights, curvature in zip(
        problem.shares, problem.weights, problem.curvatures, strict=True
    ):
        offset = weights - middle
        pull = share * norm(curvature.apply(offset))
        rows.append([share * float(curvature.trace()), norm(offset), pull])
    found = torch.tensor(rows, dtype=torch.float64)
    return multiples(found.nan_to_num(nan=math.inf, posinf=math.inf))


def hold(problem: Quadratic, weighed: Tensor, most: float) -> Quadratic:
    """Reduces what exceeds the median client's too far.

    Args:
        problem: of one layer.
        weighed: its `measure`.
        most: multiple of the median client's that is left to anyone.

    Returns:
        The problem with smaller shares, and with weights drawn towards the median weights; itself
        if there is nothing to reduce.
    """
    if float(weighed.max()) <= most:
        return problem
    information, distance, pull = _reduction(weighed, most).T
    scale = torch.minimum(information, pull).tolist()
    shares = [share * by for share, by in zip(problem.shares, scale, strict=True)]
    return Quadratic(shares, draw_in(problem.weights, distance), problem.curvatures)


def hold_values(
    shares: Sequence[float], values: Sequence[Tensor], most: float
) -> tuple[list[float], list[Tensor]]:
    """Reduces what exceeds the median client's too far, where there is no curvature.

    Args:
        shares: one positive number for each client.
        values: tensors of one shape.
        most: multiple of the median client's that is left to anyone.

    Returns:
        Smaller shares, and values drawn towards their median; all the way where most are alike to
        the bit, as a constant is.
    """
    middle = median(values)
    distances = torch.tensor([[norm(v - middle)] for v in values], dtype=torch.float64)
    times = multiples(distances)
    if 2 * int((distances == 0).sum()) > len(values):
        times = times.where(distances == 0, math.inf)
    due = _reduction(multiples(torch.tensor(shares, dtype=torch.float64).unsqueeze(1)), most)
    held = [share * float(by) for share, by in zip(shares, due, strict=True)]
    return held, draw_in(values, _reduction(times, most).squeeze(1))


def median(tensors: Sequence[Tensor]) -> Tensor:
    """The median of each entry; between the middle two if their number is even.

    Args:
        tensors: of one shape.

    Returns:
        A tensor of that shape.
    """
    flat = [tensor.flatten() for tensor in tensors]
    low, high = (len(flat) - 1) // 2, len(flat) // 2
    length = max(_AT_ONCE // len(flat), 1)
    pieces = []
    for some in zip(*(torch.split(row, length) for row in flat), strict=True):
        ordered = torch.stack(some).sort(dim=0).values
        pieces.append(ordered[low] + (ordered[high] - ordered[low]) / 2)
    return torch.cat(pieces).view(tensors[0].shape)


def multiples(values: Tensor) -> Tensor:
    """How many times its column's median each value is, with zeros left out of the median.

    Args:
        values: not negative, of shape ``(clients, n)``.

    Returns:
        Of the same shape; zero where all of a column are, infinite where the value is.
    """
    middle = values.where(values > 0, math.nan).nanquantile(0.5, dim=0)
    return torch.where(values > 0, values / middle, 0.0).where(values < math.inf, values)


def draw_in(tensors: Sequence[Tensor], by: Tensor) -> list[Tensor]:
    """Moves tensors towards their median.

    Args:
        tensors: of one shape.
        by: what is left of the way to each; one leaves it as it is.

    Returns:
        The tensors.
    """
    middle = median(tensors)
    return [
        tensor if left == 1 else middle + left * (tensor - middle)
        for tensor, left in zip(tensors, by.tolist(), strict=True)
    ]


def unusual(
    weighed: Tensor,
    clients: Sequence[str],
    layers: Sequence[str],
    most: float = math.inf,
    usual: Sequence[float] = (USUAL, USUAL, USUAL),
) -> str:
    """Tells of clients that weigh far more than the median client.

    Args:
        weighed: of every layer, ``(layers, clients, 3)``: `measure`.
        clients: their names.
        layers: their names.
        most: multiple of the median client's that they are held to.
        usual: multiple, of each measure, up to which nothing is told.

    Returns:
        A line for each such client, with what and where, and one on what is done about it; empty
        if there is none.
    """
    lines = []
    for name, own in zip(clients, weighed.unbind(1), strict=True):
        found = []
        for what, values, limit in zip(MEASURES, own.unbind(1), usual, strict=True):
            order = values.argsort(descending=True, stable=True).tolist()
            if where := [layers[index] for index in order if values[index] > limit]:
                more = f" and {len(where) - 3} more layers" if len(where) > 3 else ""
                found.append((float(values.max()), f"{what} in {', '.join(where[:3])}{more}"))
        if found:
            told = ", ".join(f"{times:.3g} times the {what}" for times, what in sorted(found)[::-1])
            lines.append(f"{name} has, of the median client's, {told}")
    if not lines:
        return ""
    bound = "any share" if most == math.inf else f"{most:g} times the median client's"
    lines.append(f"max_influence leaves each {bound}; look at such a client before you go on")
    return "\n".join(lines)


def _reduction(times: Tensor, most: float) -> Tensor:
    """What to multiply by, so that nothing is more than so many times the median."""
    return torch.where(times > most, most / times, 1.0)
