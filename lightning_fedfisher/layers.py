"""Layers: which parameters form one unit of curvature, and how they become one matrix.

A layer is the unit of all that follows: curvature has one block for each layer, the merge is a
separate problem for each layer, and a rank of the server owns whole layers. A weight of shape
``(out, *rest)`` is a matrix of shape ``(out, prod(rest))``, and a bias of shape ``(out,)`` is its
last column (the homogeneous coordinate of Martens & Grosse, 2015). A parameter that fits no such
pair forms a layer of its own.
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
    """Parameters that share one block of curvature: a weight and its bias, or one parameter.

    Attributes:
        name: Path of the module that holds them, or the parameter's own name if the module holds
            parameters of several layers.
        parameters: Name and shape of each parameter; a weight first, then its bias.

    Example:
        >>> layer = Layer("fc", (("fc.weight", (2, 3)), ("fc.bias", (2,))))
        >>> layer.shape, layer.inputs, layer.is_linear, layer.parameter_names
        ((2, 4), 3, True, ('fc.weight', 'fc.bias'))
        >>> layer.join({"fc.weight": torch.zeros(2, 3), "fc.bias": torch.ones(2)})
        tensor([[0., 0., 0., 1.],
                [0., 0., 0., 1.]])
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
        """Number of rows and columns of the layer's matrix, the bias column included."""
        rows = self._rows(self.parameters[0][1])
        return rows, sum(math.prod(shape) // rows for _, shape in self.parameters)

    @property
    def inputs(self) -> int:
        """Number of columns without that of the bias."""
        _, columns = self.shape
        return columns - (len(self.parameters) - 1)

    @property
    def kernel(self) -> int:
        """Elements of a convolution's kernel, over which the columns of each input run; else 1.

        A transposed convolution has its inputs on the rows, and so do embeddings: what follows the
        second dimension of a weight is called its kernel all the same.
        """
        return math.prod(self.parameters[0][1][2:])

    @property
    def is_linear(self) -> bool:
        """Whether its weight is a matrix, as of a linear layer, and not the filters of another."""
        return len(self.parameters[0][1]) == 2

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Joins the layer's parameters to one matrix.

        Args:
            tensors: Parameters by name; those of other layers are ignored.

        Returns:
            A matrix of shape ``self.shape``, with the bias as its last column.
        """
        rows = self.shape[0]
        return torch.cat([tensors[name].reshape(rows, -1) for name in self.parameter_names], dim=1)

    def split(self, matrix: Tensor) -> dict[str, Tensor]:
        """Splits a matrix into the layer's parameters: the inverse of `join`.

        Args:
            matrix: A matrix of shape ``self.shape``.

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
    """The layer whose outputs another layer reads.

    Each output of the layer that is read feeds a block of the reader's input columns: one column
    between linear layers, the kernel's positions before a convolution, and the positions of the
    feature map if it was flattened. Pooling and dropout in between are not recorded.

    Attributes:
        layer: Name of the layer that is read.
        activation: What its outputs go through before they are read.

    Example:
        >>> Source("conv1", "relu")
        Source(layer='conv1', activation='relu')
    """

    layer: str
    activation: Activation


def find_layers(model: nn.Module) -> tuple[Layer, ...]:
    """Groups a model's trained parameters into layers, one block of curvature each.

    Every trained parameter belongs to exactly one layer. A parameter that several modules share is
    one parameter, under its first name (`aliases` has the others). A frozen parameter belongs to no
    layer: it is the same on all clients and is not merged.

    Args:
        model: Any module. It is not changed.

    Returns:
        The layers, in the order of ``model.named_parameters()``.

    Raises:
        UnsupportedModelError: If parameters are empty or not yet initialised, share a part of their
            memory, or if none is trained; all are named at once.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1, bias=False))
        >>> {layer.name: layer.shape for layer in find_layers(model)}
        {'0': (2, 4), '2': (1, 2)}
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
        pairs = {} if is_transposed(module) else _pairs(shapes)
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
    """Finds the further names of parameters and buffers that several modules share.

    Args:
        model: Any module. It is not changed.

    Returns:
        The first name of a parameter or buffer, by each of its other names.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> model[1].weight = model[0].weight
        >>> aliases(model)
        {'1.weight': '0.weight'}
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
    """Finds the parameters that are not trained.

    Args:
        model: Any module. It is not changed.

    Returns:
        The parameters by name.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
        >>> list(frozen_parameters(model))
        ['0.weight', '0.bias', '1.weight', '1.bias']
    """
    return {name: p for name, p in model.named_parameters() if not p.requires_grad}


def is_transposed(module: nn.Module) -> bool:
    """Tells whether a module's weight has inputs on its rows, so that its bias has no place there.

    The linear layer of GPT-2 goes by its name: transformers need not be installed.
    """
    return isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)) or any(
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
        for kind in type(module).__mro__
    )


def _pairs(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Finds the bias of each weight: it has one entry for each row, and a name that matches."""
    pairs = {}
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        bias = f"{path}.{leaf.replace('weight', 'bias')}".lstrip(".")
        if "weight" in leaf and shape and shapes.get(bias) == shape[:1]:
            pairs[name] = bias
    return pairs


def _title(name: str) -> str:
    """Names a layer by its module if the parameter is a ``weight``, else by the parameter."""
    path, _, leaf = name.rpartition(".")
    return path if path and leaf == "weight" else name


def _overlapping(model: nn.Module) -> list[str]:
    """One line for each group of parameters that share memory without being the same."""
    spans = []
    for name, parameter in model.named_parameters():
        if parameter.is_meta:  # has no memory
            continue
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
        elif parameter.is_complex():
            offenders.append(
                f"{name} is complex: keep it as real numbers (torch.view_as_real) and make it "
                "complex in forward (torch.view_as_complex)"
            )
    for path, module in model.named_modules():
        if isinstance(module, BATCH_NORMS) and module.running_mean is None:
            offenders.append(
                f"{path or 'the model'} normalises by the statistics of the batch even in eval "
                "mode, so that there is no curvature of one sample: set track_running_stats=True"
            )
    return offenders


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""What normalises by statistics of the batch. Those of other libraries inherit from these."""
