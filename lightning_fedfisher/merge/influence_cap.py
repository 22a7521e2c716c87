"""What one client may weigh in a merge: measured in every layer, and capped.

**Threat model.** The server is honest but curious, clients are strangers, and files may be
anybody's.

*What the server learns of a client*: everything in its update. The weights themselves, from which
images have been reconstructed where models are small or overfitted; the second moments of each
layer's inputs and gradients, the first of them those of the data; the number of samples; in the
running statistics of normalisation, and in the means of inputs before it, means of its data and
features. No noise is added, and there
is no differential privacy. A diagonal merge can do without seeing any single update:
`secure_aggregation` has the sums for it.

*What a file can do*: a malformed file can only be refused. It is never unpickled or executed, it is
checked before it is used, and the memory that it may take is bounded before it is allocated (see
`lightning_fedfisher.update`).

*What a client can do* with a valid file: send wrong weights, or claim more weight in the merge than
it should have, by its curvature or its number of samples. In every layer it is compared with the
median client by three measures: its information ``p_k tr F_k``, the distance of its weights from
the median weights, in the norm of the median client's curvature (`typical_curvature`), and its pull
``p_k ||F_k (W_k - W_median)||``. What exceeds ``max_influence`` times the median client's is capped
there, by a smaller client weight or by shrinking its weights to the median weights. In any one
direction its part of its own curvature is bounded by as many times the median client's, with some
damping: else a client would decide alone wherever no other has information. Clients within the
bounds stay as they are, to the bit; those near them are named, as they are by ``fedfisher verify``.
Of buffers, no entry may be farther from the median than that many times the median client's. The
same update twice counts once.

*What remains*: a client within the bound may still lie, as one trained on wrong labels or with a
backdoor does. Who is told all updates can aim an ordinary client's pull, in all layers at once, at
the weights' most sensitive direction: that costs more than any bound on what one client weighs can
take back, and more where several join. Half of the clients together move the median. One or two
clients cannot be judged by others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fedfisher.merge.objective import Quadratic, norm
from lightning_fedfisher.merge.typical_curvature import TypicalCurvature

MEASURES = ("information", "distance", "pull")
"""The columns of what `measure` returns."""

DEFAULT_MAX_INFLUENCE = 2.0
"""Default of `max_influence`: a client may weigh twice what the median client does."""

_AT_ONCE = 2**19  # entries whose median is taken in one go: they stay in a processor's cache
_FEW = 16  # clients that comparing neighbours sorts faster


def measure(problem: Quadratic, typical: TypicalCurvature | None = None) -> Tensor:
    """Measures what each client weighs in one layer, in one pass over the curvatures.

    Args:
        problem: The quadratic of the layer.
        typical: The curvature by whose norm distances are measured; all weights count the same if
            None.

    Returns:
        For each client the three `MEASURES`, as multiples of the median client's: of shape
        ``(clients, 3)``, in float64. Zeros do not count for a median. Infinite where float32
        overflows. The distance of least-squares fits says nothing, and is zero.

    Example:
        >>> from lightning_fedfisher.curvature.base import Identity
        >>> weights = [torch.full((1, 1), value) for value in (0.0, 1.0, 2.0, 20.0)]
        >>> problem = Quadratic([1] * 4, weights, [Identity((1, 1))] * 4)
        >>> measure(problem)[-1, MEASURES.index("distance")]
        tensor(18.5000, dtype=torch.float64)
    """
    middle = median(problem.weights)
    rows = []
    for p, weights, curvature in zip(
        problem.client_weights, problem.weights, problem.curvatures, strict=True
    ):
        offset = weights - middle
        pull = p * norm(curvature.apply(offset))
        # The fit of a few samples is anywhere in directions that they do not show.
        length = norm if typical is None else typical.distance
        distance = length(offset) if problem.fit is None else 0.0
        rows.append([p * float(curvature.trace()), distance, pull])
    found = torch.tensor(rows, dtype=torch.float64)
    return multiples(found.nan_to_num(nan=math.inf, posinf=math.inf))


def cap(
    problem: Quadratic,
    influence: Tensor,
    max_influence: float,
    typical: TypicalCurvature | None = None,
) -> Quadratic:
    """Caps what a client weighs in one layer at a multiple of the median client's.

    Args:
        problem: The quadratic of the layer.
        influence: Its `measure`.
        max_influence: Multiple of the median client's that a client may have.
        typical: The curvature that the client's is compared with in each direction; if None, it is
            left as it is.

    Returns:
        The quadratic with less curvature in some directions, with smaller client weights, and with
        weights shrunk to the median weights, for the clients beyond the bound; the very same
        quadratic if there are none.
    """
    curvatures = problem.curvatures
    if typical is not None:
        curvatures = typical.all_bounded(curvatures, max_influence)
    if curvatures is problem.curvatures and float(influence.max()) <= max_influence:
        return problem
    information, distance, pull = _reduction(influence, max_influence).T
    scale = torch.minimum(information, pull).tolist()
    reduced = [p * by for p, by in zip(problem.client_weights, scale, strict=True)]
    weights = shrink_to_median(problem.weights, distance)
    return Quadratic(reduced, weights, curvatures, problem.fit)


def cap_values(
    client_weights: Sequence[float], values: Sequence[Tensor], max_influence: float
) -> tuple[list[float], list[Tensor]]:
    """Caps what a client weighs in an average of values, where there is no curvature.

    Args:
        client_weights: A positive number for each client.
        values: A tensor for each client, all of one shape.
        max_influence: Multiple of the median client's that a client may have.

    Returns:
        Smaller client weights, and values of which no entry is farther from the median than the
        bound allows, for the clients beyond it: as a multiple of the median client's distance in
        that entry, or in the mean entry if that is more. Where most clients agree to the bit, as on
        a constant, so do all.
    """
    heavy = multiples(torch.tensor(client_weights, dtype=torch.float64).unsqueeze(1))
    scale = _reduction(heavy, max_influence)
    capped = [p * float(by) for p, by in zip(client_weights, scale, strict=True)]
    if max_influence == math.inf:
        return capped, list(values)
    middle = median(values)
    offsets = [(value - middle).abs() for value in values]
    usual = median(offsets)
    # Of few clients one entry's median is anywhere, and so it may be that of all entries.
    overall = median([norm(offset) / offset.numel() ** 0.5 * torch.ones(1) for offset in offsets])
    far = max_influence * usual.clamp_min(float(overall)).where(usual > 0, 0.0)
    within = [value.clamp(middle - far, middle + far) for value in values]
    return capped, [
        value if torch.equal(value, held) else held
        for value, held in zip(values, within, strict=True)
    ]


def median(tensors: Sequence[Tensor]) -> Tensor:
    """Takes the median of each entry; half-way between the middle two of an even number.

    Args:
        tensors: A tensor for each client, all of one shape.

    Returns:
        A tensor of that shape.
    """
    flat = [tensor.flatten() for tensor in tensors]
    low, high = (len(flat) - 1) // 2, len(flat) // 2
    length = max(_AT_ONCE // len(flat), 1)
    pieces = []
    for some in zip(*(torch.split(row, length) for row in flat), strict=True):
        ordered = _sorted(some)
        pieces.append(ordered[low] + (ordered[high] - ordered[low]) / 2)
    return torch.cat(pieces).view(tensors[0].shape)


def _sorted(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Sorts each entry over a few tensors, by comparing neighbours in turns, or over many."""
    ordered = list(tensors)
    if len(ordered) > _FEW:
        return torch.stack(ordered).sort(dim=0).values.unbind()
    smaller, larger = torch.minimum, torch.maximum
    if not torch.stack([tensor.sum() for tensor in ordered]).isfinite().all():
        # Where one is not a number, both become the other: it has no part in a median. As this
        # takes ten times as long, it is done where there may be such.
        smaller, larger = torch.fmin, torch.fmax
    for turn in range(len(ordered)):
        for low in range(turn % 2, len(ordered) - 1, 2):
            one, other = ordered[low : low + 2]
            ordered[low : low + 2] = smaller(one, other), larger(one, other)
    return ordered


def multiples(values: Tensor) -> Tensor:
    """Divides each value by the median of its column, in which zeros do not count.

    Args:
        values: Numbers that are not negative, of shape ``(clients, n)``.

    Returns:
        A tensor of the same shape; infinite where the value is infinite.
    """
    middle = values.where(values > 0, math.nan).nanquantile(0.5, dim=0)
    return torch.where(values > 0, values / middle, 0.0).where(values < math.inf, values)


def shrink_to_median(tensors: Sequence[Tensor], by: Tensor) -> list[Tensor]:
    """Moves tensors towards their median.

    Args:
        tensors: A tensor for each client, all of one shape.
        by: For each client, the part of its distance to the median that is left; 1 changes nothing.

    Returns:
        A tensor for each client.
    """
    middle = median(tensors)
    return [
        tensor if left == 1 else middle + left * (tensor - middle)
        for tensor, left in zip(tensors, by.tolist(), strict=True)
    ]


def _reduction(times: Tensor, most: float) -> Tensor:
    """Factors that bring multiples of the median down to at most ``most``."""
    return torch.where(times > most, most / times, 1.0)
