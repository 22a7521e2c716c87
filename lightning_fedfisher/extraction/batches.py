"""Logits and labels of a batch, and batches of some of its samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_fedfisher.errors import UnsupportedModelError

Forward = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor]]
"""Maps ``(module, batch)`` to logits, or to ``(logits, labels)``."""

# How far a sample's logits may differ in two batches, relative to the largest logit. Rounding in
# float32 stays far below it; a normalisation by batch statistics does not.
_ROUNDING = 1e-3
# Parts of the message of a module that defines no forward pass.
_NO_FORWARD = 'missing the required "forward"'


class BatchRunner:
    """Runs a model on batches of any form, and gets their logits and labels."""

    def __init__(
        self,
        forward: Forward | None,
        prepare: Callable[[Any], Any] | None = None,
        mark_unobserved: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Keeps what the user gave.

        Args:
            forward: Function that maps ``(module, batch)`` to logits, or to ``(logits, labels)``.
                None stands for batches ``(x, y)`` and logits ``module(x)``.
            prepare: Function applied to each batch first; None leaves it as the loader gives it.
            mark_unobserved: Function applied to the labels of each batch; None for nothing.
        """
        self._forward = forward
        self._prepare = prepare
        self._mark_unobserved = mark_unobserved

    def prepare(self, model: nn.Module, batch: Any) -> Any:
        """Moves a batch to the model's device, and up to its precision.

        Args:
            model: The model that will be run on it.
            batch: A batch as the loader gives it.

        Returns:
            A batch of the same form. Floating-point tensors have the type of the parameters, if
            these have one in common and it can hold them: digits are never dropped, as of a time
            stamp in float64.
        """
        device = next(model.parameters()).device
        dtype = _common_type(model)

        def move(tensor: Tensor) -> Tensor:
            raised = (
                dtype is not None
                and tensor.is_floating_point()
                and torch.promote_types(tensor.dtype, dtype) == dtype
            )
            return tensor.to(device, dtype if raised else None)

        batch = batch if self._prepare is None else self._prepare(batch)
        return apply_to_collection(batch, Tensor, move)

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Runs the model on a batch.

        Args:
            model: The model to run.
            batch: A batch from `prepare`.

        Returns:
            The logits, and the labels; None if `forward` returned none.

        Raises:
            ValueError: If the batch or the model's output is unusable.
        """
        forward = self._forward
        if forward is None:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise ValueError(
                    f"a batch is {type(batch).__name__}, not a pair (x, y): pass forward=, a "
                    "function of (module, batch) that returns logits, or (logits, labels)"
                )
            forward = _forward_pair
        try:
            with _default_type(_common_type(model)):
                output = forward(model, batch)
        except NotImplementedError as error:
            if _NO_FORWARD not in str(error):
                raise
            raise ValueError(
                f"{type(model).__name__} defines no forward(): pass forward=, a function of "
                "(module, batch) that returns logits, or (logits, labels)"
            ) from error
        if isinstance(output, tuple) and len(output) != 2:
            raise ValueError(
                f"the model's output is a tuple of {len(output)}: pass forward= to return its "
                "logits, or (logits, labels)"
            )
        logits, labels = output if isinstance(output, tuple) else (output, None)
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"the model's output is {type(logits).__name__}, no tensor: pass forward= to "
                "return its logits"
            )
        if isinstance(labels, np.ndarray | list | tuple):
            labels = torch.as_tensor(labels)
        if not isinstance(labels, Tensor):
            labels = None
        elif self._mark_unobserved is not None:
            labels = self._mark_unobserved(labels)
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
        because = f" ({detail})" if str(detail) else ""
        super().__init__(
            [
                "the logits of a sample depend on the other samples of its batch, on how many "
                "there are (a normalisation by batch statistics?) or on chance: there is no "
                f"curvature of one sample{because}; if its batches are not cut by the first "
                "dimension of their tensors (lists, offsets, graphs, time first), give them one "
                "sample each: batch_size=1"
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
    # Logits of classes that cannot be are -inf in both.
    apart = (again.detach() - before).where(again != before, 0.0).abs().max()
    largest = logits.where(logits.isfinite(), 0.0).abs().max()
    diverged = bool(logits.isnan().any())  # which is another trouble, told elsewhere
    if not diverged and not apart <= _ROUNDING * largest.clamp_min(1.0):
        raise MixedSamplesError


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tells whether an error says that memory did not suffice, on whatever device."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _forward_pair(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model(batch[0]), batch[1]


def _common_type(model: nn.Module) -> torch.dtype | None:
    """The type of all floating-point parameters; None if they have several."""
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return types.pop() if len(types) == 1 else None


@contextmanager
def _default_type(dtype: torch.dtype | None) -> Iterator[None]:
    """Makes float64 the type of tensors that a model of that type makes, as training in it does."""
    if dtype != torch.float64 or torch.get_default_dtype() == torch.float64:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
