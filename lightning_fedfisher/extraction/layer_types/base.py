"""What every type of layer tells: how one of its calls turns into per-sample gradients.

The matrix ``W`` of a layer has shape ``(rows, columns)``, its bias being the last column. For one
sample, the gradient of the loss with respect to ``W`` is a sum over positions ``t`` (pixels or
tokens; a plain vector has one) of the outer products ``r_t c_t'``. Each layer type says what ``r``
and ``c`` are:

======================  ==================================  ================================
layer type              ``r``, one entry a row               ``c``, one entry a column
======================  ==================================  ================================
Linear                  gradient at the output               input
Convolution             gradient at the output               patch of the input
TransposedConvolution   input                                patch of the gradient
TransposedLinear        input                                gradient at the output
Embedding               which token, as a unit vector        gradient at the output
======================  ==================================  ================================

The scale of a normalisation has no such product: each of its entries has a gradient of its own.

Two conventions hold in all layer types. The first dimension of inputs runs over samples, or over
``samples * frames`` with the frames of one sample next to each other. Gradients have one more
dimension, before that one: several directions may be back-propagated through one forward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override


class LayerType(ABC):
    """What one call of a layer computes, as far as the gradient of its weights needs it.

    Subclass this for a layer without Kronecker factors: it then gets an exact diagonal block.
    Subclass `KroneckerLayer` where the gradient is a product of two sides, and `SparseLayer` where
    most of its rows are zero.

    Example:
        A parameter that every feature is multiplied by, as in ``x * scale``:

        >>> class Scale(LayerType):
        ...     title = "a scale"
        ...
        ...     def per_sample_gradients(self, inputs, gradients, samples):
        ...         return (gradients * inputs).transpose(0, 1).flatten(0, 1).unsqueeze(2)
        >>> inputs, gradients = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(1, 2, 2)
        >>> Scale().per_sample_gradients(inputs, gradients, samples=2).tolist()
        [[[1.0], [2.0]], [[3.0], [4.0]]]
    """

    title: ClassVar[str] = ""
    """Name in reports that say why a layer has no Kronecker factors, such as "a scale or shift"."""

    kind: ClassVar[str] = "diagonal"
    """Kind of block that a K-FAC extraction gives the layer: a key of `curvature.KINDS`."""

    def sample_axes(self, ndim: int) -> int:
        """Counts the leading dimensions of an input among which samples may be.

        Args:
            ndim: Number of dimensions of the input.

        Returns:
            A number from 1 to ``ndim``. 1 if samples can only be in the first dimension.
        """
        return 1

    def channel_axis(self, ndim: int) -> int | None:
        """Finds the dimension of inputs and outputs that the layer's matrix maps.

        Args:
            ndim: Number of dimensions of the input.

        Returns:
            The index of the dimension, or None if the layer does not map outputs of other layers
            to outputs of its own by its matrix.
        """
        return None

    def is_outer_product(self, inputs: Tensor, samples: int) -> bool:
        """Tells whether the gradient of one sample is the outer product of just two vectors.

        Args:
            inputs: Input of the call.
            samples: Number of samples in it.
        """
        return False

    @property
    def kfac_kind(self) -> str:
        """Kind of block that K-FAC gives the layer; with EKFAC it is always that of `kind`."""
        return self.kind

    @abstractmethod
    def per_sample_gradients(self, inputs: Tensor, gradients: Tensor, samples: int) -> Tensor:
        """Computes the gradient of each sample with respect to the layer's matrix.

        Args:
            inputs: Input of the call, of shape ``(samples * frames, ...)``.
            gradients: Gradients at its output, of shape ``(directions, *output.shape)``.
            samples: Number of samples.

        Returns:
            A tensor of shape ``(samples * directions, rows, columns)``. Its first dimension may be
            in any order, because only sums over it are ever needed.
        """

    def peak_numel(self, inputs: Tensor, gradients: Tensor) -> int:
        """Estimates the size of the largest intermediate tensor of a call.

        Args:
            inputs: Input of the call.
            gradients: Gradients at its output, of shape ``(directions, *output.shape)``.

        Returns:
            A number of entries; chunks of samples are chosen by it.
        """
        return max(inputs.numel(), gradients.numel())


class KroneckerLayer(LayerType):
    """A call whose per-sample gradient is a sum over positions of outer products.

    One side of the products comes from the call's input, the other from the gradient at its output.
    The second moments of the two sides are the factors of K-FAC.
    """

    kind: ClassVar[str] = "kronecker"

    inputs_are_rows: ClassVar[bool] = False
    """Whether the rows of the layer's matrix belong to its inputs, rather than to its outputs."""

    @abstractmethod
    def unfold_inputs(self, inputs: Tensor, samples: int) -> Tensor:
        """Arranges the input of a call by position.

        Args:
            inputs: Input of the call, of shape ``(samples * frames, ...)``.
            samples: Number of samples.

        Returns:
            A tensor of shape ``(samples, features, positions)``; a feature of ones is the last if
            the matrix has a bias column.
        """

    @abstractmethod
    def unfold_gradient(self, gradient: Tensor, samples: int) -> Tensor:
        """Arranges a gradient at the output of a call by position.

        Args:
            gradient: One gradient, of the output's shape ``(samples * frames, ...)``.
            samples: Number of samples.

        Returns:
            A tensor of shape ``(samples, features, positions)``.
        """

    def unfold_gradients(self, gradients: Tensor, samples: int) -> Tensor:
        """Arranges the gradients of all directions by position.

        Args:
            gradients: Gradients at the output, of shape ``(directions, *output.shape)``.
            samples: Number of samples.

        Returns:
            A tensor of shape ``(directions * samples, features, positions)``.
        """
        return self.unfold_gradient(gradients.flatten(0, 1), len(gradients) * samples)

    def count_positions(self, inputs: Tensor, gradient: Tensor) -> int:
        """Counts how often the layer's matrix is applied, over all samples together.

        Args:
            inputs: Input of the call.
            gradient: One gradient at its output.

        Returns:
            The number of positions of one sample, times the number of samples.
        """
        per_channel = inputs if self.inputs_are_rows else gradient
        return per_channel.numel() // per_channel.shape[1]

    def unfold_both(self, inputs: Tensor, gradients: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """Arranges both sides of a call by position, sample by sample.

        Args:
            inputs: Input of the call.
            gradients: Gradients at its output, of shape ``(directions, *output.shape)``.
            samples: Number of samples.

        Returns:
            The inputs, of shape ``(samples, features, positions)``, and the gradients, of shape
            ``(samples, directions * features, positions)``.
        """
        unfolded = self.unfold_gradients(gradients, samples)
        if len(gradients) > 1:
            unfolded = unfolded.view(len(gradients), samples, *unfolded.shape[1:])
            unfolded = unfolded.transpose(0, 1).flatten(1, 2)
        return self.unfold_inputs(inputs, samples), unfolded

    def unfold_inputs_at(self, inputs: Tensor, samples: int, positions: Tensor) -> Tensor:
        """Arranges the input of a call at some positions of each sample.

        Args:
            inputs: Input of the call.
            samples: Number of samples.
            positions: Indices of positions, of shape ``(samples, some)``.

        Returns:
            A tensor of shape ``(samples, features, some)``.
        """
        return take_positions(self.unfold_inputs(inputs, samples), positions)

    def outer_products(self, inputs: Tensor, gradients: Tensor, directions: int) -> Tensor:
        """Multiplies the two sides into per-sample gradients.

        Args:
            inputs: Unfolded inputs, of shape ``(samples, features, positions)``.
            gradients: Unfolded gradients, of shape ``(samples, directions * features, positions)``.
            directions: Number of directions.

        Returns:
            A tensor of shape ``(samples * directions, rows, columns)``.
        """
        products = (gradients @ inputs.mT).reshape(len(inputs) * directions, -1, inputs.shape[1])
        return products.mT if self.inputs_are_rows else products

    @override
    def per_sample_gradients(self, inputs: Tensor, gradients: Tensor, samples: int) -> Tensor:
        unfolded, unfolded_gradients = self.unfold_both(inputs, gradients, samples)
        return self.outer_products(unfolded, unfolded_gradients, len(gradients))


@dataclass(frozen=True)
class Unfolded(KroneckerLayer):
    """A call that is arranged by position already, at some of the positions that it has.

    Inputs have shape ``(samples, features, some)``, and each gradient as well. Both are scaled so
    that their second moments stand for those at all positions. They may be at other positions than
    each other, so that they have second moments but no products.

    Attributes:
        original: What the call computes.
        positions: Number of positions that a sample has.
    """

    original: KroneckerLayer
    positions: int

    @property
    def inputs_are_rows(self) -> bool:  # type: ignore[override]
        """As of the call."""
        return self.original.inputs_are_rows

    @override
    def count_positions(self, inputs: Tensor, gradient: Tensor) -> int:
        return len(inputs) * self.positions

    @override
    def unfold_inputs(self, inputs: Tensor, samples: int) -> Tensor:
        return inputs

    @override
    def unfold_gradient(self, gradient: Tensor, samples: int) -> Tensor:
        return gradient


class SparseLayer(LayerType):
    """A call whose per-sample gradient has few rows that are not zero, as of an embedding.

    Such gradients are never written out as a whole.
    """

    @abstractmethod
    def nonzero_rows(
        self, inputs: Tensor, gradients: Tensor, samples: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Finds the rows of per-sample gradients that may not be zero.

        Args:
            inputs: Input of the call, of shape ``(samples, ...)``.
            gradients: Gradients at the output, of shape ``(directions, *output.shape)``.
            samples: Number of samples.

        Returns:
            Three tensors with an entry for each such row: the number of the pair of direction and
            sample whose gradient it is part of, its place in the matrix, and its entries, of shape
            ``(columns,)``. Rows of the same pair at the same place are to be added.
        """


@dataclass(frozen=True)
class FunctionCall:
    """The arguments of a call of a `torch.nn.functional` function, and what it does with them.

    Weight and bias are apart because either may be trained without the other, or belong to another
    layer.

    Attributes:
        inputs: Input of the call.
        weight: Weight it was given, or None.
        bias: Bias it was given, or None.
        weight_type: Builds the layer type of the weight, given whether its matrix has the bias as
            its last column. None if the call is not understood in this form.
        bias_type: Layer type of a bias that is a layer of its own. None if there is no bias.
    """

    inputs: Tensor
    weight: Tensor | None
    bias: Tensor | None
    weight_type: Callable[[bool], LayerType] | None
    bias_type: LayerType | None


def are_alike(types: Iterable[LayerType]) -> bool:
    """Tells whether calls are of one layer type.

    Args:
        types: The layer type of each call.

    Example:
        >>> from lightning_fedfisher.extraction.layer_types.embedding import Embedding
        >>> from lightning_fedfisher.extraction.layer_types.linear import Linear
        >>> are_alike([Linear(False), Linear(False)])
        True
        >>> are_alike([Linear(False), Embedding(tokens=2, padding=None)])
        False
    """
    return len({type(layer_type) for layer_type in types}) == 1


def append_ones(tensor: Tensor, dim: int) -> Tensor:
    """Appends one slice of ones along a dimension: the input that a bias column is multiplied by.

    Args:
        tensor: Any tensor.
        dim: Dimension that grows by one.

    Returns:
        A new tensor.
    """
    shape = list(tensor.shape)
    shape[dim] = 1
    return torch.cat([tensor, tensor.new_ones(shape)], dim=dim)


def take_positions(tensor: Tensor, positions: Tensor) -> Tensor:
    """Takes some positions of each sample.

    Args:
        tensor: A tensor of shape ``(samples, features, positions)``.
        positions: Indices of positions, of shape ``(samples, some)``.

    Returns:
        A tensor of shape ``(samples, features, some)``.
    """
    return tensor.gather(2, positions.unsqueeze(1).expand(-1, tensor.shape[1], -1))


def flatten_positions(tensor: Tensor, samples: int) -> Tensor:
    """Arranges images, or any tensor with channels in its second dimension, by position.

    Args:
        tensor: A tensor of shape ``(samples * frames, channels, ...)``.
        samples: Number of samples.

    Returns:
        A tensor of shape ``(samples, channels, frames * positions)``.
    """
    frames = len(tensor) // samples
    flat = tensor.reshape(samples, frames, tensor.shape[1], -1)
    return flat.squeeze(1) if frames == 1 else flat.transpose(1, 2).flatten(2)
