"""The weights that a round starts from: read from a file, checked, and told apart by a digest."""

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


def read_start(path: Path, network: nn.Module, new_head: bool = False) -> dict[str, Tensor]:
    """Reads weights that must fit the network entry for entry; nothing is unpickled.

    Args:
        path: safetensors file of a state dict, of the network's or of the classifier's around it.
        network: which the weights are for; not changed.
        new_head: keep the network's last linear layer, whatever the file holds of it.

    Returns:
        The weights, by the network's own names.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no safetensors file, or does not fit; all misfits are named.
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
    """The network's state dict, of the classifier's that holds it.

    Args:
        state: of a `Classifier`.

    Returns:
        The same tensors by the network's names.
    """
    return {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}


def start_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of all names and tensors, in whatever order.

    Args:
        weights: on the CPU.

    Returns:
        In hexadecimal.
    """
    lines = (f"{name} {digest(weights[name])}\n" for name in sorted(weights))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _last_linear(network: nn.Module) -> str:
    """The name of the layer that gives the classes."""
    *_, last = (name for name, part in network.named_modules() if isinstance(part, nn.Linear))
    return last


def _misfit(found: Tensor | None, expected: Tensor | None) -> str | None:
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
