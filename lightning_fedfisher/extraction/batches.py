"""Logits and labels of a batch, and batches of some of its samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_fedfisher.errors import UnsupportedModelError

Forward = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor]]
"""Maps ``(module, batch)`` to logits, or to ``(logits, labels)``."""

# How far a sample's logits may differ in two batches, relative to the largest logit. Rounding in
# float32 stays far below it; a normalisation by batch statistics does not.
_ROUNDING = 1e-3
# Where a batch that is a mapping may keep its labels.
_LABEL_KEYS = ("label", "labels", "target", "targets", "y")


class BatchRunner:
    """Runs a model on batches of any form, and gets their logits and labels."""

    def __init__(self, forward: Forward | None, prepare: Callable[[Any], Any] | None) -> None:
        """Keeps what the user gave.

        Args:
            forward: Function that maps ``(module, batch)`` to logits, or to ``(logits, labels)``.
                None stands for batches ``(x, y)`` and logits ``module(x)``.
            prepare: Function applied to each batch first; None leaves it as the loader gives it.
        """
        self._forward = forward
        self._prepare = prepare

    def prepare(self, model: nn.Module, batch: Any) -> Any:
        """Moves a batch to the model's device and precision.

        Args:
            model: The model that will be run on it.
            batch: A batch as the loader gives it.

        Returns:
            A batch of the same form. Floating-point tensors have the dtype of the parameters.
        """
        like = next(model.parameters())

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)

        batch = batch if self._prepare is None else self._prepare(batch)
        return apply_to_collection(batch, Tensor, move)

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Runs the model on a batch.

        Args:
            model: The model to run.
            batch: A batch from `prepare`.

        Returns:
            The logits, and the labels; None if the form of the batch does not tell where they are.

        Raises:
            ValueError: If the batch or the model's output is unusable.
        """
        forward = self._forward
        if forward is None:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise ValueError(
                    f"a batch is {type(batch).__name__}, not a pair (x, y): pass `forward`, a "
                    "function of (module, batch) that returns logits, or (logits, labels)"
                )
            forward = _forward_pair
        output = forward(model, batch)
        if isinstance(output, tuple) and len(output) != 2:
            raise ValueError(
                f"the model's output is a tuple of {len(output)}: pass `forward` to return its "
                "logits, or (logits, labels)"
            )
        logits, labels = output if isinstance(output, tuple) else (output, _labels_of(batch))
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"the model's output is {type(logits).__name__}, no tensor: pass `forward` to "
                "return its logits"
            )
        return logits, labels

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        """Runs the model on a batch from `prepare`, and returns its logits alone."""
        return self(model, batch)[0]


def map_samples(batch: Any, samples: int, change: Callable[[Tensor], Tensor]) -> Any:
    """Changes those tensors of a batch that run over its samples.

    Args:
        batch: A batch of any form.
        samples: Number of samples in it.
        change: Function applied to every tensor with as many entries in its first dimension.

    Returns:
        A batch of the same form; everything else in it is the same.

    Example:
        >>> import torch
        >>> map_samples({"x": torch.arange(3), "scale": torch.ones(2)}, 3, lambda x: x[:1])
        {'x': tensor([0]), 'scale': tensor([1., 1.])}
    """

    def change_samples(tensor: Tensor) -> Tensor:
        return change(tensor) if tensor.ndim and len(tensor) == samples else tensor

    return apply_to_collection(batch, Tensor, change_samples)


class MixedSamplesError(UnsupportedModelError):
    """The logits of a sample depend on more than the sample, so that it has no curvature."""

    def __init__(self, detail: object = "") -> None:
        """Writes the message.

        Args:
            detail: What gave it away, added to the message; empty if there is nothing to add.
        """
        because = f" ({detail})" if detail else ""
        super().__init__(
            [
                "the logits of a sample depend on the other samples of its batch, on how many "
                "there are (a normalisation by batch statistics?) or on chance: there is no "
                f"curvature of one sample{because}"
            ]
        )


def require_same_logits(again: Tensor, logits: Tensor, rows: Tensor | slice) -> None:
    """Refuses a model whose logits of some samples differ from those within the whole batch.

    Args:
        again: Logits of some samples that were run without the others, of shape ``(rows, *)``.
        logits: Logits of the whole batch, of shape ``(samples, *)``.
        rows: The samples that were run again.

    Raises:
        MixedSamplesError: If they differ by more than rounding, or in number.
    """
    before = logits[rows]
    if len(again) != len(before):
        raise MixedSamplesError
    apart = (again.detach() - before).abs().max()
    if apart > _ROUNDING * logits.abs().max().clamp_min(1.0):
        raise MixedSamplesError


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tells whether an error says that memory did not suffice, on whatever device."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _forward_pair(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model(batch[0]), batch[1]


def _labels_of(batch: Any) -> Tensor | None:
    """Finds the labels of a batch; None if its form does not tell where they are."""
    found: Any = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in _LABEL_KEYS if key in batch), None)
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        found = batch[1]
    return found if isinstance(found, Tensor) else None
