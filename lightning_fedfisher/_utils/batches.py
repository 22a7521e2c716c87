"""What is known of a batch of any form."""

from __future__ import annotations

from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


def count_samples(batch: Any) -> int:
    """Counts the samples of a batch: the first dimension of its first tensor.

    Args:
        batch: A tensor, or a collection that holds one.

    Returns:
        The number of samples.

    Raises:
        ValueError: If there is no tensor.

    Example:
        >>> import torch
        >>> count_samples({"name": "a", "x": torch.ones(3, 2)})
        3
    """
    sizes: list[int] = []
    apply_to_collection(batch, Tensor, lambda tensor: sizes.append(len(tensor)))
    if not sizes:
        raise ValueError(f"a batch of {type(batch).__name__} holds no tensor")
    return sizes[0]
