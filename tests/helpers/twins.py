"""Classes as `pytorch_lightning` has them, beside those of the same names in `lightning`."""

from __future__ import annotations

from typing import Any


def twin_of(kind: type, *bases: type, **members: Any) -> type:
    """Makes a class of the same name that is none of Lightning's other package."""
    module = kind.__module__.replace("lightning.pytorch", "pytorch_lightning", 1)
    return type(kind.__name__, bases or (object,), {"__module__": module} | members)
