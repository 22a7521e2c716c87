"""What the units of a layer have become in the merged model, told from second moments alone.

Once a layer is merged, its outputs are no client's any more, and what comes next would read them
with weights made for others. On a client's data the second moments of both are known: with inputs
of second moment ``A``, weights ``W`` of the client and ``V`` of the merged model, they are
``W A V'`` across and ``V A V'`` among the merged outputs. Behind a rectifier they are those of the
arc-cosine kernel (Cho & Saul, 2009), exact where the outputs are normal with mean zero; pooling is
passed over. Two ridge regressions follow: from merged units to the client's, for its weights, and
back, for its curvature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.curvature.input_map import InputMap
from lightning_fedfisher.layers import Activation

# A share of all second moments: what is known of a direction with less is drawn to "as it was".
_RIDGE = 0.1


@dataclass(frozen=True)
class Alignment:
    """How the inputs of one client's layer relate to those it has in the merged model.

    Attributes:
        to_client: the client's inputs as expected from the merged model's.
        to_merged: the merged model's as expected from the client's.
    """

    to_client: InputMap
    to_merged: InputMap

    def weights(self, matrix: Tensor) -> Tensor:
        """The client's weights, for the merged model's inputs.

        Args:
            matrix: of shape ``(out, in)``.

        Returns:
            Of the same shape.
        """
        return self.to_client.on_columns(matrix)

    def curvature(self, curvature: Curvature) -> Curvature:
        """The client's curvature, with the second moments that the merged model's inputs have.

        Args:
            curvature: of a kind that holds its inputs' second moments.

        Returns:
            Of the same kind.
        """
        return curvature.with_inputs(self.to_merged)


def align(
    client: Tensor, merged: Tensor, moments: Curvature, activation: Activation
) -> tuple[Tensor, Tensor]:
    """Relates the units of a client's layer to those of the merged one.

    Args:
        client: its weights ``W``, of shape ``(units, in)``, for the merged model's inputs.
        merged: ``V``, of the same shape.
        moments: ``I x A``, second moments of the merged model's inputs on the client's data.
        activation: what the units go through.

    Returns:
        The maps between units behind the activation, each of shape ``(units, units)`` in float64:
        from merged to the client's, and from the client's to merged.
    """
    seen, own = moments.apply(merged).double(), moments.apply(client).double()
    client, merged = client.double(), merged.double()
    across, among, alone = client @ seen.mT, merged @ seen.mT, client @ own.mT
    if activation == "relu":
        ours, theirs = among.diagonal(), alone.diagonal()
        across = _rectified(across, theirs, ours)
        among = _rectified(among, ours, ours)
        alone = _rectified(alone, theirs, theirs)
    return _regression(across, among), _regression(across.mT, alone)


def _rectified(moments: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Second moments behind a rectifier, of normal variables with mean zero.

    Args:
        moments: before it, ``(m, n)``.
        rows: second moment of each row's variable.
        columns: of each column's.

    Returns:
        The arc-cosine kernel of degree one, ``(m, n)``.
    """
    scale = torch.outer(rows.clamp_min(0).sqrt(), columns.clamp_min(0).sqrt())
    cosine = torch.where(scale > 0, moments / scale, 0.0).clamp(-1, 1)
    angle = cosine.acos()
    return scale * (angle.sin() + (math.pi - angle) * cosine) / (2 * math.pi)


def _regression(across: Tensor, among: Tensor) -> Tensor:
    """The matrix that predicts the one side from the other, drawn to the identity.

    Args:
        across: second moments between what is predicted and what is known.
        among: of what is known.

    Returns:
        ``(across + r I) (among + r I)^-1`` with `_RIDGE` times the trace as ``r``.
    """
    floor = _RIDGE * among.trace() * torch.eye(len(among)).to(among)
    if not floor.any():  # nothing is known
        return torch.eye(len(among)).to(among)
    regression: Tensor = torch.linalg.solve(among + floor, across + floor, left=False)
    return regression
