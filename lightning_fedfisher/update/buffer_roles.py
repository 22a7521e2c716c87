"""What is known of a buffer by its name: the running statistics of normalisation layers."""

from __future__ import annotations

from lightning_fedfisher.batch_norms import buffer_names
from lightning_fedfisher.update.tensor_checks import StoredRole

_MEAN, _VARIANCE = buffer_names("")


def variance_partner(name: str) -> str | None:
    """Names the running mean that belongs to a running variance.

    Args:
        name: Name of a buffer, with the path of its module.

    Returns:
        Name of the mean, which the model may or may not have. None if the buffer is no running
        variance.

    Example:
        >>> variance_partner("norm.running_var")
        'norm.running_mean'
        >>> variance_partner("norm.num_batches_tracked") is None
        True
    """
    return f"{name.removesuffix(_VARIANCE)}{_MEAN}" if name.endswith(_VARIANCE) else None


def buffer_role(name: str) -> StoredRole | None:
    """Says what a buffer must be: running statistics are squared when they are merged.

    Args:
        name: Name of the buffer, with the path of its module.

    Returns:
        The role of the buffer. None if nothing is known of it.

    Example:
        >>> buffer_role("norm.running_var"), buffer_role("norm.running_mean")
        ('values', 'mean')
    """
    if variance_partner(name) is not None:
        return "values"
    return "mean" if name.endswith(_MEAN) else None
