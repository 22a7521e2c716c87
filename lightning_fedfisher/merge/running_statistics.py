"""The merged model's running statistics, estimated on unlabelled samples of the server.

BatchNorm normalises by the mean and variance that its inputs had in training. The merged weights
are nobody's: their outputs have other means and less variance than each client's, the more so the
deeper the network, and the clients' statistics together do not tell which (REPAIR, Jordan et al.,
2023). Some samples do, without labels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_fedfisher.distributed.progress import progress_bar

Estimate = Callable[[Mapping[str, Tensor], torch.device], tuple[dict[str, Tensor], int]]
"""Finds the running statistics of a state on a device, and the number of samples it saw."""

# Public names cover what torch.nn ships; BatchNorms of other libraries inherit from these.
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def tracked_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Finds the normalisation layers that normalise by running statistics of the batch.

    Args:
        model: Any module.

    Returns:
        The layers by their paths.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.LayerNorm(2))
        >>> list(tracked_norms(model))
        ['1']
    """
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, _BATCH_NORMS) and module.running_mean is not None
    }


def estimator(model: nn.Module | None, batches: Iterable[Any]) -> Estimate:
    """Makes `estimate_statistics` of a model and samples, or refuses them before any work.

    Args:
        model: The model that will be run; None if there is none.
        batches: The samples.

    Returns:
        A function of the merged state and the device.

    Raises:
        ValueError: If there is no model, or it has no running statistics, or if the samples can be
            read only once.
    """
    if model is None:
        raise ValueError("a statistics loader needs a model to run: pass model=...")
    if not tracked_norms(model):
        raise ValueError(
            "the model has no running statistics to estimate: leave the statistics loader out"
        )
    if isinstance(batches, Iterator):
        raise ValueError("statistics may take several passes: pass a DataLoader or a list")
    return partial(estimate_statistics, model, batches)


def estimate_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    state: Mapping[str, Tensor],
    device: torch.device,
) -> tuple[dict[str, Tensor], int]:
    """Runs a model with the merged weights, and takes its running statistics anew.

    Each layer normalises by the statistics of the batch, as in training, so that the layers behind
    it see what they will see. Everything else is in eval mode: nothing is dropped at random.

    Args:
        model: The model; it is not changed.
        batches: Inputs, or tuples and lists of which the first item is the input. Of several
            samples each: a batch of one has no variance.
        state: The merged parameters and buffers by name; what is missing keeps the model's values.
        device: Where to run.

    Returns:
        Running means and variances by buffer name, as means over batches, each with the weight of
        its samples; and the number of samples.

    Raises:
        ValueError: If there are no samples, or statistics leave the finite numbers; all such are
            named.

    Example:
        >>> model, x = nn.Sequential(nn.BatchNorm1d(1, affine=False)), torch.tensor([[1.0], [3.0]])
        >>> found, samples = estimate_statistics(model, [x], {}, torch.device("cpu"))
        >>> found["0.running_mean"], found["0.running_var"], samples
        (tensor([2.]), tensor([2.]), 2)
    """
    copied = copy.deepcopy(model).to(device).eval()
    copied.load_state_dict(state, strict=False)
    norms, samples = tracked_norms(copied), 0
    for norm in norms.values():
        norm.train()
    # Whoever shuffles, or only starts a DataLoader, draws random numbers: the same on all ranks.
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        for batch in progress_bar(batches, "running statistics", None):
            inputs = batch[0] if isinstance(batch, list | tuple) else batch
            inputs = apply_to_collection(inputs, Tensor, lambda tensor: tensor.to(device))
            count = _count(inputs)
            samples += count
            for norm in norms.values():
                norm.momentum = count / samples  # type: ignore[assignment]
            copied(inputs)
    if not samples:
        raise ValueError("the statistics loader gives no samples")
    found = {
        f"{path}.{name}".lstrip("."): norm.get_buffer(name)
        for path, norm in norms.items()
        for name in ("running_mean", "running_var")
    }
    if lost := [name for name, tensor in found.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{', '.join(lost)} are not finite on the samples of the server")
    return found, samples


def _count(inputs: Any) -> int:
    """Counts the samples of a batch: the first dimension of its first tensor."""
    sizes: list[int] = []
    apply_to_collection(inputs, Tensor, lambda tensor: sizes.append(len(tensor)))
    if not sizes:
        raise ValueError(f"a batch of {type(inputs).__name__} holds no tensor")
    return sizes[0]
