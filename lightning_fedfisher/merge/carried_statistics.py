"""What the clients' running statistics become under the merged weights, without data.

A client's statistics are those of its own weights. Behind a layer of merged weights ``V``, on the
client's inputs of mean ``m`` and second moment ``A``, outputs have mean ``V m`` and variance
``diag(V A V') - (V m)^2``. The client measured both for its own weights ``W``, and only the change
is computed: ``(V - W) m`` is added to its means, and its variances are multiplied by the ratio of
what is computed for ``V`` and for ``W``. So what was rounded or drawn in ``A`` hardly matters, and
a client's statistics are its own where ``V`` is ``W``. Where ``A`` is not known, as of a grouped
convolution, the ratio is that of independent inputs: of the rows' squared norms.

That holds for inputs as they are in the client. They are about the same in the merged model if its
outputs are: `similarity` tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fedfisher.batch_norms import Normalized, buffer_names
from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.curvature.registry import KINDS
from lightning_fedfisher.distributed.progress import progress_bar
from lightning_fedfisher.layers import Layer
from lightning_fedfisher.merge.influence_cap import median
from lightning_fedfisher.update.client_update import ClientUpdate

ALIKE = 0.9
"""The `similarity` from which the inputs of layers are about what they are in the clients."""

# Of the variance that a client measured. What is computed below it is rounding.
_FLOOR = 1e-2


def common_norms(updates: Sequence[ClientUpdate]) -> dict[str, Normalized]:
    """Finds the BatchNorm layers whose statistics all clients can carry over.

    Args:
        updates: The updates of all clients, found to belong together.

    Returns:
        The layers that they normalise, by their paths: where all clients sent means, and agree.
    """
    first, *others = (update.header.normalized for update in updates)
    return {
        path: norm
        for path, norm in first.items()
        if all(other.get(path) == norm for other in others)
    }


def carried_buffers(
    updates: Sequence[ClientUpdate], merged: Mapping[str, Tensor], moments: bool = True
) -> list[dict[str, Tensor]]:
    """Carries each client's running statistics over to the merged weights.

    Args:
        updates: The updates of all clients, found to belong together.
        merged: The merged matrix of each layer, by layer name.
        moments: Whether to use the second moments of inputs that the clients sent.

    Returns:
        For each client its buffers that are carried over, by name.
    """
    norms, layers = common_norms(updates), {layer.name: layer for layer in updates[0].layers}
    found = []
    for update in progress_bar(updates, "running statistics", len(updates)):
        buffers: dict[str, Tensor] = {}
        with update.opened():
            for path, norm in norms.items():
                layer = layers[norm.layer]
                outputs = _Outputs.of(update, layer, norm, moments)
                names = buffer_names(path)
                own = [update.buffer(name) for name in names]
                location, variance = (buffer.double() for buffer in own)
                moved = outputs.moved(merged[norm.layer].cpu().double(), location, variance)
                for name, buffer, value in zip(names, own, moved, strict=True):
                    limits = torch.finfo(buffer.dtype)
                    buffers[name] = value.clamp(limits.min, limits.max).to(buffer)
        found.append(buffers)
    return found


def similarity(updates: Sequence[ClientUpdate]) -> float | None:
    """Tells how much a merge of the clients would compute what they compute.

    Of each layer that a BatchNorm follows, it compares the outputs that the clients' median weights
    give on a client's inputs with the client's own: their correlation, as the median over outputs
    and over clients. So a few clients cannot decide it.

    Args:
        updates: The updates of all clients, found to belong together.

    Returns:
        The least of any layer, at most 1. None if it is known of no layer.
    """
    norms, first = common_norms(updates).values(), updates[0]
    known = {norm.layer: norm for norm in norms if _holds_moments(first, norm)}
    layers = [layer for layer in first.layers if layer.name in known]
    least: list[float] = []
    for layer in progress_bar(layers, "similarity of the clients"):
        middle = median([update.weights(layer) for update in updates]).double()
        found = []
        for update in updates:
            with update.opened():
                outputs = _Outputs.of(update, layer, known[layer.name])
            correlations = outputs.correlations(middle)
            if len(correlations):
                found.append(correlations.quantile(0.5))
        if found:
            least.append(float(torch.stack(found).quantile(0.5)))
    return min(least, default=None)


def describe_unlike(found: float | None) -> str:
    """Tells that running statistics were carried over to inputs that the merged model has not.

    Args:
        found: The `similarity` of the clients; None if it is not known.

    Returns:
        What to do about it; empty if they are alike, or nothing is known.

    Example:
        >>> describe_unlike(0.95)
        ''
    """
    if found is None or found >= ALIKE:
        return ""
    return (
        f"the clients' layers compute unlike outputs (similarity {found:.2f}, alike from {ALIKE}), "
        "and running statistics of the merged weights are known roughly: statistics_loader=, a few "
        "hundred samples without labels, may gain much"
    )


def _holds_moments(update: ClientUpdate, norm: Normalized) -> bool:
    """Tells whether a client sent the second moment of what all outputs of a layer read."""
    kind = KINDS[update.header.kinds[norm.layer]]
    return norm.groups == 1 and kind.exact_inputs and kind.inputs_on == "columns"


@dataclass(frozen=True)
class _Outputs:
    """The outputs of a client's layer, for any weights on the client's inputs; in float64.

    Attributes:
        own: The client's weights.
        mean: The mean of what each output's weights are multiplied by, of the weights' shape.
        moments: The second moment of the inputs; None if it is not known, and inputs are taken to
            vary alike and independently.
        center: The mean of the inputs that `moments` were computed from.
        inputs: Number of columns without that of the bias.
    """

    own: Tensor
    mean: Tensor
    moments: Curvature | None
    center: Tensor
    inputs: int

    @classmethod
    def of(
        cls, update: ClientUpdate, layer: Layer, norm: Normalized, moments: bool = True
    ) -> _Outputs:
        """Reads a layer of a client.

        Args:
            update: The client's update.
            layer: The layer.
            norm: What is known of it.
            moments: Whether to read the second moment of the inputs, if there is one.
        """
        own, mean = update.weights(layer).double(), update.input_mean(layer).double()
        held, center = None, mean
        if moments and _holds_moments(update, norm):
            held = update.block(layer, dtype=torch.float64).of_inputs()
            if layer.inputs < layer.shape[1]:
                # Where the bias has its column are the means of the very samples and positions.
                unit = torch.zeros_like(own)
                unit[:, -1] = 1
                center = held.apply(unit)[:1]
        rows = layer.shape[0] // norm.groups
        return cls(own, mean.repeat_interleave(rows, dim=0), held, center, layer.inputs)

    def means(self, weights: Tensor) -> Tensor:
        """Computes the mean of each output, of shape ``(rows,)``."""
        return (weights * self.mean).sum(1)

    def covariances(self, one: Tensor, other: Tensor) -> Tensor:
        """Computes the covariance of each output for some weights with that for others."""
        if self.moments is None:
            return (one * other)[:, : self.inputs].sum(1)
        centered = (one * self.center).sum(1) * (other * self.center).sum(1)
        return (self.moments.apply(one) * other).sum(1) - centered

    def correlations(self, weights: Tensor) -> Tensor:
        """Computes the correlation of outputs with the client's own, of those that vary in both."""
        spreads = self.covariances(weights, weights), self.covariances(self.own, self.own)
        together = self.covariances(weights, self.own)
        vary = (spreads[0] > 0) & (spreads[1] > 0)
        found = together[vary] / (spreads[0][vary] * spreads[1][vary]).sqrt()
        return found.clamp(-1, 1)

    def moved(self, weights: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Carries means and variances, measured for the client's weights, over to others."""
        before, after = (self.covariances(each, each) for each in (self.own, weights))
        floor = _FLOOR * (variance if self.moments is not None else before)
        lowest, highest = torch.maximum(before, floor), torch.maximum(after, floor)
        moved = variance * torch.where(lowest > 0, highest / lowest, 1.0)
        if self.moments is not None:  # of an output that is constant in the client
            moved = torch.where(variance > 0, moved, after.clamp_min(0))
        return mean + self.means(weights - self.own), moved
