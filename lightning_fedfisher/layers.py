"""Layers: which parameters form one unit of curvature, and how they become one matrix.

A layer is the unit of everything that follows: curvature is a block per layer, the merge is a
separate problem per layer, a server rank owns whole layers. A weight of shape ``(out, *rest)`` is
the matrix ``(out, prod(rest))``; a bias of shape ``(out,)`` is its last column (the homogeneous
coordinate of Martens & Grosse, 2015). Parameters that fit no such pair form a layer each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_fedfisher.errors import UnsupportedModelError

Activation = Literal["identity", "relu"]


@dataclass(frozen=True)
class Layer:
    """Parameters that share one curvature block.

    Attributes:
        name: the module's path, or the parameter's own name where it stands alone.
        parameters: name and shape of each parameter; a weight first, then its bias.
    """

    name: str
    parameters: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the parameters, as in ``model.named_parameters()``."""
        return tuple(name for name, _ in self.parameters)

    @property
    def module_name(self) -> str:
        """Path of the module that holds the parameters; empty for the model itself."""
        return self.parameters[0][0].rpartition(".")[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the layer's matrix, the bias column included."""
        rows = self._rows(self.parameters[0][1])
        return rows, sum(math.prod(shape) // rows for _, shape in self.parameters)

    @property
    def inputs(self) -> int:
        """Columns without the bias."""
        _, columns = self.shape
        return columns - (len(self.parameters) - 1)

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Writes the layer's parameters as one matrix.

        Args:
            tensors: parameters by name; others are ignored.

        Returns:
            A matrix of shape ``self.shape``; a bias is the last column.
        """
        rows = self.shape[0]
        return torch.cat([tensors[name].reshape(rows, -1) for name in self.parameter_names], dim=1)

    def split(self, matrix: Tensor) -> dict[str, Tensor]:
        """Takes a matrix apart into parameters: the inverse of `join`.

        Args:
            matrix: of shape ``self.shape``.

        Returns:
            The parameters by name, each in its own shape and memory.
        """
        rows = self.shape[0]
        widths = [math.prod(shape) // rows for _, shape in self.parameters]
        pieces = torch.split(matrix, widths, dim=1)
        return {
            name: piece.reshape(shape).clone(memory_format=torch.contiguous_format)
            for (name, shape), piece in zip(self.parameters, pieces, strict=True)
        }

    @staticmethod
    def _rows(shape: tuple[int, ...]) -> int:
        return shape[0] if shape else 1


@dataclass(frozen=True)
class Source:
    """The layer whose outputs another layer reads, one block of input columns for each of them.

    A block is one column between linear layers, the kernel's positions before a convolution, and
    the feature map's where it was flattened. Pooling and dropout in between are not recorded.

    Attributes:
        layer: name of the layer that is read.
        activation: what its outputs go through before they are.
    """

    layer: str
    activation: Activation


def find_layers(model: nn.Module) -> tuple[Layer, ...]:
    """Groups the trained parameters of a model into layers, each parameter exactly once.

    A parameter that several modules share is one parameter, under its first name (`aliases` has
    the others). A frozen one belongs to no layer: it is the same on all clients and is not merged.

    Args:
        model: any module; nothing about it is changed.

    Returns:
        The layers, in the order of ``model.named_parameters()``.

    Raises:
        UnsupportedModelError: if parameters are empty or not yet initialised, share a part of their
            memory, or if none is trained; all are named at once.
    """
    offenders = _unusable(model)
    if not any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        offenders += _overlapping(model)
    if offenders:
        raise UnsupportedModelError(offenders)
    layers: list[Layer] = []
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for path, module in model.named_modules():
        own = module.named_parameters(prefix=path, recurse=False)
        shapes = {name: tuple(parameter.shape) for name, parameter in own if name in trained}
        pairs = {} if isinstance(module, _TRANSPOSED) else _pairs(shapes)
        for name, shape in shapes.items():
            if name in pairs:
                bias = pairs[name]
                layers.append(Layer(_title(name), ((name, shape), (bias, shapes[bias]))))
            elif name not in pairs.values():
                alone = len(shapes) == 1
                layers.append(Layer(_title(name) if alone else name, ((name, shape),)))
    if not layers:
        raise UnsupportedModelError(["the model has no parameters that are trained"])
    return tuple(layers)


def aliases(model: nn.Module) -> dict[str, str]:
    """Further names of parameters and buffers that several modules share.

    Args:
        model: any module.

    Returns:
        The first name of a parameter or buffer, by each of its others.
    """
    first = {
        id(tensor): name
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())
    }
    every = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    return {name: first[id(tensor)] for name, tensor in every if first[id(tensor)] != name}


def frozen_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are not trained, by name.

    Args:
        model: any module.
    """
    return {name: p for name, p in model.named_parameters() if not p.requires_grad}


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _pairs(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Biases by their weights: as many entries as the weight has rows, and a name that tells."""
    pairs = {}
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        bias = f"{path}.{leaf.replace('weight', 'bias')}".lstrip(".")
        if "weight" in leaf and shape and shapes.get(bias) == shape[:1]:
            pairs[name] = bias
    return pairs


def _title(name: str) -> str:
    """The module's path, for its only layer; else the parameter's own name."""
    path, _, leaf = name.rpartition(".")
    return path if path and leaf == "weight" else name


def _overlapping(model: nn.Module) -> list[str]:
    """One line for each group of parameters that share memory without being the same."""
    spans = []
    for name, parameter in model.named_parameters():
        reach = sum((n - 1) * s for n, s in zip(parameter.shape, parameter.stride(), strict=True))
        start = parameter.data_ptr()
        spans.append((start, start + (reach + 1) * parameter.element_size(), name))
    groups: list[list[str]] = []
    end = -1
    for start, stop, name in sorted(spans):
        if start < end:
            groups[-1].append(name)
        else:
            groups.append([name])
        end = max(end, stop)
    return [
        f"{' and '.join(group)} share memory and are different parameters: make them one, which "
        "both modules hold, or copy it"
        for group in groups
        if len(group) > 1
    ]


def _unusable(model: nn.Module) -> list[str]:
    offenders = []
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            offenders.append(f"{name} is not initialised: run one forward pass first")
        elif parameter.numel() == 0:
            offenders.append(f"{name} is empty: remove it")
    for path, module in model.named_modules():
        if isinstance(module, _BATCH_NORMS) and module.running_mean is None:
            offenders.append(
                f"{path or 'the model'} normalises by the statistics of the batch even in eval "
                "mode, so that there is no curvature of one sample: set track_running_stats=True"
            )
        for weights in ("weight", "pos_weight"):
            if isinstance(module, _LOSSES) and isinstance(getattr(module, weights, None), Tensor):
                offenders.append(
                    f"{path or 'the model'} is a {type(module).__name__} with {weights}: a "
                    "likelihood has no class weights; train without, or balance the samples"
                )
    return offenders


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss, nn.BCELoss, nn.BCEWithLogitsLoss)
