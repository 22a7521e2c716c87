"""Finds where the samples of a batch are in the input of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class BatchAxis:
    """The dimension of a tensor that runs over samples.

    Attributes:
        axis: The dimension.
        folded: Empty if it runs over samples alone. ``"outer"`` if it runs over samples and frames,
            with the frames of one sample next to each other, as after ``x.flatten(0, 1)``.
            ``"inner"`` if the samples of one frame are next to each other.

    Example:
        >>> import torch
        >>> frames_first = torch.tensor([[0], [1], [0], [1]])  # two frames of samples 0 and 1
        >>> BatchAxis(0, "inner").samples_first(frames_first, samples=2).flatten().tolist()
        [0, 0, 1, 1]
    """

    axis: int
    folded: Literal["", "outer", "inner"] = ""

    def fits(self, tensor: Tensor, samples: int) -> bool:
        """Tells whether a tensor can have its samples here.

        Args:
            tensor: Any tensor.
            samples: Number of samples.
        """
        size = tensor.shape[self.axis] if tensor.ndim > self.axis else 0
        return size % samples == 0 if self.folded else size == samples

    def samples_first(self, tensor: Tensor, samples: int) -> Tensor:
        """Moves the samples to the first dimension.

        Args:
            tensor: A tensor with its samples here.
            samples: Number of samples.

        Returns:
            A tensor whose first dimension runs over samples, or over ``samples * frames`` with the
            frames of one sample next to each other.
        """
        if self.folded == "inner":
            apart = tensor.reshape(-1, samples, *tensor.shape[1:])
            return apart.transpose(0, 1).flatten(0, 1)
        return tensor.movedim(self.axis, 0)

    def first_sample(self, tensor: Tensor, samples: int) -> Tensor:
        """Takes the part of the first sample, as a view.

        Args:
            tensor: A tensor with its samples here.
            samples: Number of samples.

        Returns:
            A tensor whose first dimension runs over the frames of the sample.
        """
        if self.folded == "inner":
            return tensor[::samples]
        first = tensor.movedim(self.axis, 0)
        return first[: len(first) // samples]

    def hits_only(self, hit: Tensor, sample: int, samples: int) -> bool:
        """Tells whether all hits are within the part of one sample.

        Args:
            hit: A tensor of truth values with its samples here.
            sample: Index of the sample.
            samples: Number of samples.
        """
        first = self.samples_first(hit, samples)
        frames = len(first) // samples
        own = first[sample * frames : (sample + 1) * frames]
        return int(own.sum()) == int(first.sum())


def possible_batch_axes(sizes: Sequence[int], hits: Sequence[Tensor | None]) -> list[BatchAxis]:
    """Finds where the samples may be in a call's input, by the gradients of one sample at a time.

    The gradient of one sample's logits at the output of a call is zero wherever another sample is.

    Args:
        sizes: Sizes of the leading dimensions of the input that may run over samples.
        hits: For each sample, a tensor of the shape of the call's output that tells where the
            gradient of this sample's logits is not zero. None if no gradient reached the call.

    Returns:
        All possibilities that agree with the sizes and with every sample.

    Example:
        >>> import torch
        >>> of_first, of_second = torch.tensor([[True], [False]]), torch.tensor([[False], [True]])
        >>> possible_batch_axes([2], [of_first, of_second])
        [BatchAxis(axis=0, folded='')]
    """
    samples = len(hits)
    possible = [BatchAxis(axis) for axis, size in enumerate(sizes) if size == samples]
    if sizes and sizes[0] > samples and sizes[0] % samples == 0:
        possible += [BatchAxis(0, "outer"), BatchAxis(0, "inner")]
    for sample, hit in enumerate(hits):
        if hit is not None:
            possible = [axis for axis in possible if axis.hits_only(hit, sample, samples)]
    return possible
