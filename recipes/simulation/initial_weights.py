"""Reads the weights that all clients start from, and checks that they fit the network."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_fedfisher.update.file_format import digest

_PREFIX = "network."  # of the classifier's own state dict


def read_initial_weights(
    path: Path, network: nn.Module, new_head: bool = False
) -> dict[str, Tensor]:
    """Reads weights from a safetensors file; they must fit the network entry for entry.

    Args:
        path: file of a state dict, of the network or of the `Classifier` around it.
        network: the network that the weights are for. It is not changed.
        new_head: whether to keep the network's last linear layer, whatever the file holds for it.

    Returns:
        The weights, by the network's own names.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no safetensors file, or does not fit; the message names all misfits.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--init {path} is no file")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"--init {path} is no whole safetensors file ({error}): write the state dict with "
            "safetensors.torch.save_file; pickled checkpoints are not opened"
        ) from error
    expected = network.state_dict()
    if all(name.startswith(_PREFIX) for name in found):
        found = without_prefix(found)
    head = _last_linear(network) + "."
    if new_head:
        found = {name: tensor for name, tensor in found.items() if not name.startswith(head)}
        found |= {name: tensor for name, tensor in expected.items() if name.startswith(head)}
    misfits = {
        name: problem
        for name in expected.keys() | found.keys()
        if (problem := _misfit(found.get(name), expected.get(name)))
    }
    if misfits:
        remedy = "give weights of the same --model, image size and number of classes"
        if all(name.startswith(head) for name in misfits):
            remedy = "add --new-head to start with a fresh last layer"
        listed = "; ".join(f"{name} {misfits[name]}" for name in sorted(misfits))
        raise ValueError(f"--init {path} does not fit the network: {listed}. To go on, {remedy}")
    return found


def without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turns the state dict of a `Classifier` into that of the network inside.

    Args:
        state: state dict of a `Classifier`.

    Returns:
        The same tensors, by the network's own names.
    """
    return {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Computes the SHA-256 digest of a state dict, whatever the order of its entries.

    Args:
        weights: tensors on the CPU, by name.

    Returns:
        The digest in hexadecimal.
    """
    lines = (f"{name} {digest(weights[name])}\n" for name in sorted(weights))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _last_linear(network: nn.Module) -> str:
    """The name of the output layer."""
    *_, last = (name for name, part in network.named_modules() if isinstance(part, nn.Linear))
    return last


def _misfit(found: Tensor | None, expected: Tensor | None) -> str | None:
    """What is wrong with a tensor, or None if it fits."""
    if found is None:
        return "is missing"
    if expected is None:
        return "is unknown"
    if found.shape != expected.shape:
        return f"is of shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    if found.dtype != expected.dtype:
        return f"is {found.dtype}, not {expected.dtype}"
    if not torch.isfinite(found).all():
        return "is not finite"
    return None
