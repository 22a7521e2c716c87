"""What a call does with a layer's weights, as far as its gradient goes.

A call of a linear map with matrix ``W`` (the bias its last column) has for each sample the gradient
``rows @ columns'``. For a Linear the rows are the gradients at its outputs and the columns its
inputs, over all positions; for a convolution the columns are patches of the input; for a transposed
convolution the rows are its inputs and the columns patches of the gradient; an embedding has tokens
for rows. Normalisations have a gradient for each channel alone.

Inputs run over samples first, or over ``samples * frames`` with the frames of a sample next to each
other. Gradients have one dimension before that: several may have been back-propagated through the
same forward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from lightning_fedfisher.extraction.layer_types.conv_geometry import ConvGeometry


class LayerType(ABC):
    """One use of a layer in a forward pass."""

    title: ClassVar[str] = ""
    """What to call it in a report, where it has no Kronecker factors."""

    kind: ClassVar[str] = "diagonal"
    """Kind of curvature that K-FAC gives it: a key of `lightning_fedfisher.curvature.KINDS`."""

    def leading(self, dimensions: int) -> int:
        """How many first dimensions of an input may run over samples.

        Args:
            dimensions: the input has.
        """
        return 1

    @abstractmethod
    def per_sample(self, inputs: Tensor, gradient: Tensor, samples: int) -> Tensor:
        """Gradient of each sample with respect to the layer's matrix.

        Args:
            inputs: of the call.
            gradient: those at its output, ``(directions, *output.shape)``.
            samples: how many there are.

        Returns:
            Of shape ``(samples * directions, out, in)``, in any order of the first.
        """

    def unfolded(self, inputs: Tensor, gradient: Tensor) -> int:
        """About how many numbers the call's inputs and gradient grow to on the way."""
        return max(inputs.numel(), gradient.numel())


class KroneckerLayer(LayerType):
    """A use whose gradient is ``rows @ columns'``."""

    kind: ClassVar[str] = "kronecker"
    inputs_are_rows: ClassVar[bool] = False
    """Whether rows come from the inputs and columns from the gradient, rather than vice versa."""

    @abstractmethod
    def from_inputs(self, inputs: Tensor, samples: int) -> Tensor:
        """What the inputs contribute: ``(samples, features, positions)``."""

    def positions(self, inputs: Tensor, gradient: Tensor) -> int:
        """How often the layer is applied, over all samples.

        Args:
            inputs: of the call.
            gradient: one at its output.

        Returns:
            The number of positions.
        """
        per_channel = inputs if self.inputs_are_rows else gradient
        return per_channel.numel() // per_channel.shape[1]

    @abstractmethod
    def from_one(self, gradient: Tensor, samples: int) -> Tensor:
        """What one gradient contributes: ``(samples, features, positions)``."""

    def from_gradient(self, gradient: Tensor, samples: int) -> Tensor:
        """What the gradients contribute: ``(directions * samples, features, positions)``."""
        return self.from_one(gradient.flatten(0, 1), len(gradient) * samples)

    def sides(self, inputs: Tensor, gradient: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """Both sides, the directions of a sample stacked on the side of the gradient.

        Args:
            inputs: of the call.
            gradient: those at its output.
            samples: how many there are.

        Returns:
            ``(samples, features, positions)`` from the inputs, and
            ``(samples, directions * features, positions)`` from the gradients.
        """
        given = self.from_gradient(gradient, samples)
        if len(gradient) > 1:
            given = given.view(len(gradient), samples, *given.shape[1:])
            given = given.transpose(0, 1).flatten(1, 2)
        return self.from_inputs(inputs, samples), given

    def product(self, given: Tensor, inputs: Tensor, directions: int) -> Tensor:
        """Per-sample gradients from the two sides.

        Args:
            given: ``(samples, directions * features, positions)``, from the gradients.
            inputs: ``(samples, features, positions)``, from the inputs.
            directions: how many there are.

        Returns:
            ``(samples * directions, out, in)``.
        """
        gradients = (given @ inputs.mT).reshape(len(inputs) * directions, -1, inputs.shape[1])
        return gradients.mT if self.inputs_are_rows else gradients

    @override
    def per_sample(self, inputs: Tensor, gradient: Tensor, samples: int) -> Tensor:
        seen, given = self.sides(inputs, gradient, samples)
        return self.product(given, seen, len(gradient))


@dataclass(frozen=True)
class Linear(KroneckerLayer):
    """``y = x W'``, at any positions between sample and feature.

    Attributes:
        bias: whether the matrix has a bias column.
    """

    bias: bool

    @override
    def leading(self, dimensions: int) -> int:
        return dimensions - 1

    @override
    def positions(self, inputs: Tensor, gradient: Tensor) -> int:
        return inputs.numel() // inputs.shape[-1]

    @override
    def from_inputs(self, inputs: Tensor, samples: int) -> Tensor:
        return _with_ones(inputs.reshape(samples, -1, inputs.shape[-1]), 2, self.bias).mT

    @override
    def from_one(self, gradient: Tensor, samples: int) -> Tensor:
        return gradient.reshape(samples, -1, gradient.shape[-1]).mT


@dataclass(frozen=True)
class Convolution(KroneckerLayer):
    """A convolution without groups, in any number of dimensions.

    Attributes:
        window: how it slides.
        bias: whether the matrix has a bias column.
    """

    window: ConvGeometry
    bias: bool

    @override
    def from_inputs(self, inputs: Tensor, samples: int) -> Tensor:
        patches = _with_ones(self.window.patches(inputs), 0, self.bias)
        return patches.reshape(len(patches), samples, -1).transpose(0, 1)

    @override
    def from_one(self, gradient: Tensor, samples: int) -> Tensor:
        return _channels(gradient, samples)

    @override
    def unfolded(self, inputs: Tensor, gradient: Tensor) -> int:
        return inputs.numel() * self.window.growth


@dataclass(frozen=True)
class GroupedConvolution(LayerType):
    """A convolution whose output channels see only the input channels of their group.

    Attributes:
        window: how it slides.
        bias: whether the matrix has a bias column.
        groups: how many.
    """

    window: ConvGeometry
    bias: bool
    groups: int
    title: ClassVar[str] = "a grouped convolution"

    @override
    def per_sample(self, inputs: Tensor, gradient: Tensor, samples: int) -> Tensor:
        patches = self.window.patches(inputs)
        columns = patches.reshape(self.groups, len(patches) // self.groups, samples, -1)
        columns = _with_ones(columns, 1, self.bias).permute(2, 0, 3, 1)
        by_channel = _channels(gradient.flatten(0, 1), len(gradient) * samples)
        rows = by_channel.reshape(len(gradient), samples, self.groups, -1, by_channel.shape[2])
        return (rows @ columns).flatten(2, 3).flatten(0, 1)

    @override
    def unfolded(self, inputs: Tensor, gradient: Tensor) -> int:
        return inputs.numel() * self.window.growth


@dataclass(frozen=True)
class TransposedConvolution(KroneckerLayer):
    """A transposed convolution without groups; its matrix is ``(inputs, outputs * elements)``.

    Attributes:
        window: how the convolution it transposes slides, over the output.
        places: positions of the input, in each dimension.
    """

    window: ConvGeometry
    places: tuple[int, ...]
    kind: ClassVar[str] = "transposed_kronecker"
    inputs_are_rows: ClassVar[bool] = True

    @override
    def from_inputs(self, inputs: Tensor, samples: int) -> Tensor:
        return _channels(inputs, samples)

    @override
    def from_one(self, gradient: Tensor, samples: int) -> Tensor:
        # What output padding adds at the far end is the end of no further window.
        sizes = [
            (n - 1) * s + d * (k - 1) + 1 - before
            for n, s, d, k, (before, _) in zip(
                self.places,
                self.window.stride,
                self.window.dilation,
                self.window.kernel,
                self.window.padding,
                strict=True,
            )
        ]
        sides = [
            side
            for size, now in reversed(list(zip(sizes, gradient.shape[2:], strict=True)))
            for side in (0, size - now)
        ]
        reached = functional.pad(gradient, sides)
        before = tuple((before, 0) for before, _ in self.window.padding)
        window = ConvGeometry(self.window.kernel, self.window.stride, before, self.window.dilation)
        patches = window.patches(reached)
        return patches.reshape(len(patches), samples, -1).transpose(0, 1)

    @override
    def unfolded(self, inputs: Tensor, gradient: Tensor) -> int:
        return gradient.numel() * self.window.growth


@dataclass(frozen=True)
class ScaleShift(LayerType):
    """The scale and shift after a normalisation, or a shift alone, of each feature.

    Attributes:
        normalised: gives the scaled quantity from the input; None where there is no scale.
        shift: whether there is one.
        features: shape of the scale or shift.
        trailing: whether features are the last dimensions rather than the one after the batch.
    """

    normalised: Callable[[Tensor], Tensor] | None
    shift: bool
    features: tuple[int, ...]
    trailing: bool
    title: ClassVar[str] = "a scale or shift"

    @override
    def leading(self, dimensions: int) -> int:
        return dimensions - len(self.features) if self.trailing else 1

    @override
    def per_sample(self, inputs: Tensor, gradient: Tensor, samples: int) -> Tensor:
        columns = []
        if self.normalised is not None:
            columns.append(self._sums(gradient * self.normalised(inputs), samples))
        if self.shift:
            columns.append(self._sums(gradient, samples))
        count = len(gradient) * samples
        # One parameter of any shape is a matrix by its first dimension; two stand side by side.
        together = columns[0] if len(columns) == 1 else torch.stack(columns, dim=2)
        return together.reshape(count, self.features[0], -1)

    def _sums(self, tensor: Tensor, samples: int) -> Tensor:
        count = len(tensor) * samples
        if self.trailing:
            return tensor.reshape(count, -1, *self.features).sum(1)
        return _channels(tensor.flatten(0, 1), count).sum(2)


@dataclass(frozen=True)
class Embedding(LayerType):
    """An embedding: the rows are tokens, so a sample's gradient has few that are not zero.

    Attributes:
        tokens: how many rows the matrix has.
        padding: a token whose row gets no gradient; None if there is none.
    """

    tokens: int
    padding: int | None
    kind: ClassVar[str] = "embedding_kronecker"

    @override
    def leading(self, dimensions: int) -> int:
        return dimensions

    @override
    def per_sample(self, inputs: Tensor, gradient: Tensor, samples: int) -> Tensor:
        owners, tokens, rows = self.rows(inputs, gradient, samples)
        count = len(gradient) * samples
        whole = rows.new_zeros(count * self.tokens, rows.shape[1])
        whole.index_add_(0, owners * self.tokens + tokens, rows)
        return whole.view(count, self.tokens, -1)

    def rows(self, inputs: Tensor, gradient: Tensor, samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """The rows looked up, but for padding.

        Args:
            inputs: the tokens.
            gradient: those at the output.
            samples: how many there are.

        Returns:
            The owner (a sample in a direction), the token and the gradient ``(rows, in)`` of each.
        """
        tokens, count = inputs.reshape(-1).repeat(len(gradient)), len(gradient) * samples
        owners = torch.arange(count, device=tokens.device).repeat_interleave(len(tokens) // count)
        flat = gradient.reshape(len(tokens), -1)
        if self.padding is None:
            return owners, tokens, flat
        real = tokens != self.padding
        return owners[real], tokens[real], flat[real]


def _with_ones(tensor: Tensor, dim: int, wanted: bool) -> Tensor:
    if not wanted:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = 1
    return torch.cat([tensor, tensor.new_ones(shape)], dim=dim)


def _channels(tensor: Tensor, samples: int) -> Tensor:
    """From ``(samples * frames, channels, ...)`` to ``(samples, channels, frames * positions)``."""
    frames = len(tensor) // samples
    flat = tensor.reshape(samples, frames, tensor.shape[1], -1)
    return flat.squeeze(1) if frames == 1 else flat.transpose(1, 2).flatten(2)
