"""Which positions of a sample enter the Kronecker factors: a few are as good as all.

The pixels of a feature map or the tokens of a text are much alike, and a factor is a mean over
them. So a layer's second moments are estimated from some positions of each sample. The estimate is
unbiased: each position has the same chance. Gradients are taken among the positions where they are
not zero, which may be a single one: that of the token a classifier reads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_fedfisher.extraction.limits import Limit, at_most, check_limit

Positions = Limit
"""Most positions of a sample: a number, "auto" (a sixteenth, but at least 2), or None (all)."""

# "auto" takes one position in so many, and at least so many.
_AUTO_FRACTION, _AUTO_FEWEST = 16, 2
# Of the golden ratio: its multiples fall evenly between 0 and 1, however many there are.
_GOLDEN = (math.sqrt(5) - 1) / 2


def check_positions(positions: object) -> None:
    """Refuses a value that is not a `Positions`.

    Args:
        positions: Value that a user gave.

    Raises:
        ValueError: If it is neither a whole number from 1, ``"auto"`` nor None.
    """
    check_limit("positions", positions)


def most_positions(positions: Positions, available: int) -> int:
    """Tells how many positions of a sample a layer's factors are computed from.

    Args:
        positions: Most positions to use, as the user gave it.
        available: Number of positions that a sample has in the layer.

    Returns:
        A number of positions, at most those available.

    Example:
        >>> most_positions("auto", 1024), most_positions("auto", 9), most_positions(None, 7)
        (64, 2, 7)
    """
    return at_most(positions, available, _AUTO_FRACTION, _AUTO_FEWEST)


def choose_positions(uniforms: Tensor, available: int | Tensor, most: int) -> Tensor:
    """Chooses positions of each sample, one in each of as many equal stretches of them.

    Args:
        uniforms: A number from 0 to below 1 for each sample, of shape ``(samples,)``.
        available: Number of positions that a sample has; of each sample, of shape
            ``(samples, 1)``, if they differ.
        most: Number of positions to choose. A sample with fewer has some of them several times.

    Returns:
        Indices in ascending order, of shape ``(samples, most)``.

    Example:
        >>> choose_positions(torch.tensor([0.0, 0.5]), available=8, most=2)
        tensor([[0, 6],
                [2, 4]])
    """
    stretches = torch.arange(most, device=uniforms.device, dtype=uniforms.dtype)
    # Another place within each stretch, or all would lie on one grid.
    within = (uniforms.unsqueeze(1) + _GOLDEN * stretches) % 1
    places = ((stretches + within) * (available / most)).long()
    return torch.minimum(places, torch.as_tensor(available) - 1)


def choose_nonzero(uniforms: Tensor, nonzero: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Chooses positions of each sample as `choose_positions` does, but among some of them.

    Args:
        uniforms: A number from 0 to below 1 for each sample, of shape ``(samples,)``.
        nonzero: Which positions to choose among, a mask of shape ``(samples, positions)``.
        most: Number of positions to choose.

    Returns:
        Indices of shape ``(samples, most)``, and for each sample the factor by which what is found
        there must be multiplied, so that its second moments stand for those at all positions: 0
        where there are none to choose among.

    Example:
        >>> nonzero = torch.tensor([[False, True, False, False], [True, True, True, True]])
        >>> choose_nonzero(torch.zeros(2), nonzero, most=1)
        (tensor([[1],
                [0]]), tensor([1., 2.], dtype=torch.float64))
    """
    counts = nonzero.sum(dim=1, keepdim=True)
    ranked = nonzero.logical_not().byte().argsort(dim=1, stable=True)  # those come first
    places = choose_positions(uniforms, counts.clamp_min(1), most)
    return ranked.gather(1, places), (counts.squeeze(1).double() / most).sqrt()


def shifted(uniforms: Tensor, index: int) -> Tensor:
    """Makes other numbers from 0 to below 1, so that no two layers choose alike.

    Args:
        uniforms: Numbers from 0 to below 1, of any shape.
        index: Index of the layer.

    Returns:
        A tensor of the same shape.
    """
    return (uniforms + _GOLDEN * index) % 1
