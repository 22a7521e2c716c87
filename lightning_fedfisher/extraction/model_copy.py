"""The copy of a model that extraction runs, isolated from the user's module and random state.

The user's module is never touched: everything runs on a deep copy in eval mode, in float32 or
better, with every random state put back afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_fedfisher._utils.random_states import kept_random_states
from lightning_fedfisher.distributed.processes import Shard
from lightning_fedfisher.extraction.deep_copy import deep_copy


def copy_model(model: nn.Module, buffers: Mapping[str, Tensor]) -> nn.Module:
    """Copies a model to work on, in eval mode and at least float32.

    Args:
        model: Any module. It is not changed. What of it cannot be copied (a lock, an open file, an
            iterator) its copy shares.
        buffers: Values that the copy's buffers get in place of the model's, by buffer name.

    Returns:
        The copy, not compiled. Hooks and graphs of the extraction die with it.

    Example:
        >>> model = nn.Linear(2, 1).to(torch.bfloat16).train()
        >>> copied = copy_model(model, {})
        >>> copied.weight.dtype, copied.training, model.training
        (torch.float32, False, True)
    """
    copied = deep_copy(model)
    for module in copied.modules():
        if vars(module).get("_trainer") is not None:
            vars(module)["log"] = vars(module)["log_dict"] = _ignored
    copied.zero_grad(set_to_none=True)
    for name, buffer in buffers.items():
        copied.get_buffer(name).copy_(buffer)
    for module in copied.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False  # whose gradients know few operations
    low_precision = {p.dtype for p in copied.parameters()} & {torch.float16, torch.bfloat16}
    return (copied.float() if low_precision else copied).eval()


def _ignored(*_args: object, **_kwargs: object) -> None:
    """Stands for `log` of a LightningModule, whose copy sees its Trainer and logs nothing."""


def first_buffers(model: nn.Module, shard: Shard) -> dict[str, Tensor]:
    """Gives every process the buffers of rank 0, which are sent.

    Under DDP running statistics differ. Every process must call this.

    Args:
        model: Any module. It is not changed.
        shard: The place of this process.

    Returns:
        The buffers by name; none for a single process, whose own they are.
    """
    if shard.world_size == 1:
        return {}
    return {name: shard.first(buffer) for name, buffer in model.named_buffers()}


def copy_around_parameters(model: nn.Module) -> nn.Module:
    """Copies all of a model but its parameters, which the model and its copy share.

    What a forward pass of the copy leaves in buffers and in any other attribute of a module (a
    cache, a counter) is unknown to the model, at no price in memory or time to speak of.

    Args:
        model: A module whose forward pass does not write to its parameters. It is not changed.

    Returns:
        The copy, which holds the same `torch.nn.Parameter` objects.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> copied = copy_around_parameters(model)
        >>> copied.weight is model.weight, copied.running_mean is model.running_mean
        (True, False)
    """
    known: dict[int, object] = {id(p): p for p in model.parameters()}
    return deep_copy(model, known)


def frozen_copy(model: nn.Module) -> nn.Module:
    """Copies all of a model but the memory of its parameters; none of them is trained in the copy.

    Args:
        model: Any module. It is not changed.

    Returns:
        The copy.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> copied = frozen_copy(model)
        >>> copied.weight.requires_grad, copied.weight.data_ptr() == model.weight.data_ptr()
        (False, True)
    """
    known: dict[int, object] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()
    }
    return deep_copy(model, known)


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Switches gradients on and autocast off, and puts every random state back afterwards.

    Args:
        model: The model that is run inside; it tells the device.

    Yields:
        None.
    """
    device = next(model.parameters()).device
    cuda = [device] if device.type == "cuda" else []
    # cuDNN's recurrent layers have no backward pass in eval mode.
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    enabled = torch.backends.cudnn.enabled and not recurrent
    with (
        torch.backends.cudnn.flags(
            enabled=enabled,  # and all else as the user has it, which would be reset
            benchmark=torch.backends.cudnn.benchmark,
            deterministic=torch.backends.cudnn.deterministic,
            allow_tf32=torch.backends.cudnn.allow_tf32,
        ),
        kept_random_states(cuda),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        yield
