"""The copy of a model that is run, and how logits and labels are got from it.

The user's module is never touched: everything runs on a deep copy in eval mode, in float32 or
better, with every random state put back afterwards.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_fedfisher.errors import UnsupportedModelError

Forward = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor]]

# Largest difference between a sample's logits in two batches, relative to the largest.
_ROUNDING = 1e-3
_LABEL_KEYS = ("label", "labels", "target", "targets", "y")


class Runner:
    """Gets logits and labels of a batch from a model."""

    def __init__(self, forward: Forward | None, prepare: Callable[[Any], Any] | None) -> None:
        """Keeps what the user gave.

        Args:
            forward: maps ``(module, batch)`` to logits, or to ``(logits, labels)``.
            prepare: applied to each batch first.
        """
        self._forward = forward
        self._prepare = prepare

    def prepare(self, model: nn.Module, batch: Any) -> Any:
        """Moves a batch to the model's device and precision.

        Args:
            model: to be run.
            batch: from the loader.

        Returns:
            The batch.
        """
        like = next(model.parameters())

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)

        batch = batch if self._prepare is None else self._prepare(batch)
        return apply_to_collection(batch, Tensor, move)

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Logits and labels of a batch.

        Args:
            model: to run.
            batch: from `prepare`.

        Returns:
            Logits, and labels where the batch's form tells.

        Raises:
            ValueError: if the batch or the output is unusable.
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
        """Logits alone."""
        return self(model, batch)[0]


def replicate(model: nn.Module, buffers: Mapping[str, Tensor]) -> nn.Module:
    """A copy to work on, in eval mode and at least float32; hooks and graphs die with it.

    Args:
        model: to copy.
        buffers: values to give it, by name.

    Returns:
        The copy.
    """
    try:
        replica = copy.deepcopy(model)
    except RuntimeError as error:
        error.add_note(
            "Curvature is extracted on a deep copy of the module, and it cannot be copied. Most "
            "often a tensor that still hangs in a graph is kept as an attribute: detach it."
        )
        raise
    replica.zero_grad(set_to_none=True)
    for name, buffer in buffers.items():
        replica.get_buffer(name).copy_(buffer)
    for module in replica.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False  # whose gradients know few operations
    low_precision = {p.dtype for p in replica.parameters()} & {torch.float16, torch.bfloat16}
    return (replica.float() if low_precision else replica).eval()


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Gradients on, autocast off, and every random state put back afterwards.

    Args:
        model: tells the device.

    Yields:
        Nothing.
    """
    device = next(model.parameters()).device
    python_state, numpy_state = random.getstate(), np.random.get_state()
    cuda = [device] if device.type == "cuda" else []
    # cuDNN's recurrent layers have no backward pass in eval mode.
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    cudnn = torch.backends.cudnn.enabled and not recurrent
    try:
        with (
            torch.backends.cudnn.flags(enabled=cudnn),
            torch.random.fork_rng(cuda),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def map_samples(batch: Any, samples: int, change: Callable[[Tensor], Tensor]) -> Any:
    """Changes what of a batch runs over its samples.

    Args:
        batch: of any form.
        samples: how many there are.
        change: applied to every tensor that has as many entries.

    Returns:
        The batch of the same form.
    """

    def mine(tensor: Tensor) -> Tensor:
        return change(tensor) if tensor.ndim and len(tensor) == samples else tensor

    return apply_to_collection(batch, Tensor, mine)


class MixedSamplesError(UnsupportedModelError):
    """The logits of a sample are not its own."""

    def __init__(self, detail: object = "") -> None:
        """Says so.

        Args:
            detail: what gave it away, if that is worth telling.
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
    """Refuses logits of some samples that differ from those within the whole batch.

    Args:
        again: of some samples without the others.
        logits: of the whole batch.
        rows: which samples.

    Raises:
        MixedSamplesError: if they differ by more than rounding.
    """
    before = logits[rows]
    if len(again) != len(before):
        raise MixedSamplesError
    apart = (again.detach() - before).abs().max()
    if apart > _ROUNDING * logits.abs().max().clamp_min(1.0):
        raise MixedSamplesError


def _forward_pair(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model(batch[0]), batch[1]


def _labels_of(batch: Any) -> Tensor | None:
    """The labels of a batch, where its form tells; Fisher types that need none go without."""
    found: Any = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in _LABEL_KEYS if key in batch), None)
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        found = batch[1]
    return found if isinstance(found, Tensor) else None
