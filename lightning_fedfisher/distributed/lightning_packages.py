"""Lightning's classes, which two packages hold: ``lightning.pytorch`` and ``pytorch_lightning``."""

from __future__ import annotations

_PACKAGES = ("lightning", "pytorch_lightning")


def is_lightnings(value: object, *names: str) -> bool:
    """Tells whether an object is of a class of Lightning's, whichever of its packages made it.

    A class of one package is none of the other's, so that `isinstance` overlooks a user's who
    imports ``pytorch_lightning``. It is told by its name here, and neither package is imported.

    Args:
        value: Any object.
        names: Names of classes.

    Returns:
        True if its class, or one that this is derived from, has such a name and is Lightning's.

    Example:
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> is_lightnings(ModelCheckpoint(), "Checkpoint"), is_lightnings("text", "str")
        (True, False)
    """
    return any(
        kind.__name__ in names and kind.__module__.split(".")[0] in _PACKAGES
        for kind in type(value).__mro__
    )
