"""A model without its values: what all clients must have in common to be merged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from lightning_fedfisher.update.header import UpdateHeader
from lightning_fedfisher.update.safetensors_layout import Spec


def describe_architecture(header: UpdateHeader, specs: Mapping[str, Spec]) -> dict[str, object]:
    """Describes each parameter and buffer of a model in a few words.

    Args:
        header: Header of an update, which knows of frozen parameters and of further names.
        specs: Shape and type of the trained weights and the buffers, by name.

    Returns:
        The descriptions by name, as texts.
    """
    parts: dict[str, object] = {
        name: f"{shape} {str(dtype).removeprefix('torch.')}"
        for name, (shape, dtype) in specs.items()
    }
    parts |= {name: frozen_at(found) for name, found in header.frozen.items()}
    return parts | {name: f"another name of {first}" for name, first in header.aliases.items()}


def frozen_at(found: str) -> str:
    """Describes a frozen parameter by its digest.

    Args:
        found: Digest of the parameter, in hexadecimal.

    Returns:
        A phrase with the first eight digits.
    """
    return f"frozen with digest {found[:8]}"


def fingerprint(architecture: Mapping[str, object]) -> str:
    """Computes the SHA-256 of a description.

    Args:
        architecture: Description by name, as of `describe_architecture`.

    Returns:
        The digest in hexadecimal, whatever the order of the names.
    """
    return hashlib.sha256(json.dumps(architecture, sort_keys=True).encode()).hexdigest()
