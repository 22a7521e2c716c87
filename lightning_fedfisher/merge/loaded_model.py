"""A copy of a model with merged weights, and what it is run on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_fedfisher._utils.unwrapping import unwrapped


def loaded_copy(model: nn.Module, state: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """Loads weights into a copy of a model, in its own dtypes and in evaluation mode.

    Args:
        model: The model; it is not changed.
        state: Parameters and buffers to load by name; what is missing keeps the model's values.
        device: Where to put the copy.

    Returns:
        The copy.

    Example:
        >>> copied = loaded_copy(nn.Dropout(), {}, torch.device("cpu"))
        >>> copied.training
        False
    """
    copied = copy.deepcopy(unwrapped(model)).to(device).eval()
    copied.load_state_dict(state, strict=False)
    return copied


def to_device(batch: Any, device: torch.device) -> Any:
    """Moves all tensors of a batch, whatever its form.

    Args:
        batch: A batch as a loader gives it.
        device: Where to.

    Returns:
        A batch of the same form.

    Example:
        >>> to_device({"x": torch.ones(1), "name": "a"}, torch.device("meta"))["x"].is_meta
        True
    """
    return apply_to_collection(batch, Tensor, lambda tensor: tensor.to(device))
