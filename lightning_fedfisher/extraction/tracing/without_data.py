"""What the layers of a model compute, found out without data: by running it on the meta device.

Or by the types of its modules, where nothing is known of its inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fedfisher.extraction.layer_types.base import FunctionCall, LayerType, are_alike
from lightning_fedfisher.extraction.layer_types.convolution import read_convolution
from lightning_fedfisher.extraction.layer_types.embedding import read_embedding
from lightning_fedfisher.extraction.layer_types.linear import read_linear
from lightning_fedfisher.extraction.layer_types.transposed_convolution import (
    read_transposed_convolution,
)
from lightning_fedfisher.extraction.layer_types.transposed_linear import TransposedLinear
from lightning_fedfisher.extraction.tracing.recorder import LayerCallRecorder, WatchedCall
from lightning_fedfisher.layers import Layer, is_transposed

LayerTypes = Mapping[str, Sequence[LayerType]]
"""What each call of a layer computes, by layer name; nothing of layers that are not understood."""


def types_by_running(
    model: nn.Module, layers: Sequence[Layer], forward: Callable[[nn.Module], Any]
) -> LayerTypes:
    """Runs a copy of a model on the meta device, where tensors have shapes and no values.

    Args:
        model: Any module. It is not changed, and its weights are not copied.
        layers: Its layers.
        forward: Function that makes inputs and runs the model on them. Tensors that it makes are on
            the meta device.

    Returns:
        What the calls of each layer compute. A layer that is used by unlike operations, or by one
        that is not known, is left out.

    Raises:
        ValueError: If the model does not run without values.

    Example:
        >>> from lightning_fedfisher.layers import find_layers
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> found = types_by_running(model, find_layers(model), lambda m: m(torch.zeros(1, 3)))
        >>> list(found)
        ['0', '2']
    """
    found: dict[str, list[LayerType]] = {}

    def note(call: WatchedCall) -> Any:
        for layer, layer_type in call.layers:
            found.setdefault(layer.name, []).append(layer_type)
        return call.run()

    copied = _on_meta(model).eval()
    try:
        with torch.device("meta"), torch.enable_grad(), LayerCallRecorder(copied, layers, note):
            forward(copied)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        raise ValueError(
            f"the model does not run on the meta device, where tensors have no values ({error}): "
            "leave `forward` out, and its layers are told by the types of its modules"
        ) from error
    return {name: types for name, types in found.items() if are_alike(types)}


def types_by_modules(model: nn.Module, layers: Sequence[Layer]) -> LayerTypes:
    """Tells what layers compute by the types of the modules that hold their parameters.

    Args:
        model: Any module. It is not run.
        layers: Its layers.

    Returns:
        What each layer computes if the module's own ``forward`` uses its weight, once for each
        module that holds it. Layers of unlike or unknown modules are left out.

    Example:
        >>> from lightning_fedfisher.layers import find_layers
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        >>> types_by_modules(model, find_layers(model)).keys()
        dict_keys(['0'])
    """
    parameters = dict(model.named_parameters())
    holders: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(module)
    found: dict[str, list[LayerType]] = {}
    for layer in layers:
        weight, *biases = (parameters[name] for name in layer.parameter_names)
        modules = holders[id(weight)]
        if any(holders[id(bias)] != modules for bias in biases):
            continue  # a module uses one without the other
        types = [_type_in(module, weight, bool(biases)) for module in modules]
        known = [layer_type for layer_type in types if layer_type is not None]
        if len(known) == len(types) and are_alike(known):
            found[layer.name] = known
    return found


def _on_meta(model: nn.Module) -> nn.Module:
    """Copies a model without its weights and buffers, which become tensors on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        meta = parameter.detach().to("meta")
        memo[id(parameter)] = nn.Parameter(meta, requires_grad=parameter.requires_grad)
    memo |= {id(buffer): buffer.detach().to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def _type_in(module: nn.Module, weight: Tensor, has_bias: bool) -> LayerType | None:
    """What a module computes with a weight; None if that is not known, or has no factors."""
    call = _call_of(module, weight)
    if call is None or call.weight_type is None:
        return None
    return call.weight_type(has_bias)


def _call_of(module: nn.Module, weight: Tensor) -> FunctionCall | None:
    """The function call that a module makes with its weight, on an input without samples."""
    if isinstance(module, nn.MultiheadAttention):
        # Its queries, keys and values are one linear map, unless their sizes differ.
        return read_linear(weight, weight) if weight is module.in_proj_weight else None
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return read_linear(weight, weight)
    if weight is not getattr(module, "weight", None):
        return None
    if is_transposed(module) and weight.ndim == 2:  # as GPT-2's
        return FunctionCall(weight, weight, None, lambda has_bias: TransposedLinear(), None)
    if isinstance(module, nn.Linear):
        return read_linear(weight, weight)
    if isinstance(module, nn.Embedding):
        return read_embedding(weight, weight, module.padding_idx, module.max_norm)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        geometry = module.stride, module.padding, module.dilation, module.groups
        return read_convolution(weight, weight, None, *geometry)
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return read_transposed_convolution(weight, weight, groups=module.groups)
    return None
