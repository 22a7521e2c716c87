"""Layers: which parameters form one unit of curvature, and how they become one matrix.

A layer is the unit of everything that follows: curvature is a block per layer, the merge is a
separate problem per layer, a server rank owns whole layers. A weight of shape ``(out, *rest)`` is
the matrix ``(out, prod(rest))``; a bias of shape ``(out,)`` is its last column (the homogeneous
coordinate of Martens & Grosse, 2015). Parameters that fit no such pair form a layer each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class UnsupportedModelError(ValueError):
    """The model holds parameters whose curvature would be missing or wrong."""

    def __init__(self, offenders: Sequence[str]) -> None:
        """Lists every offender in one message.

        Args:
            offenders: one line for each parameter or module refused, with the reason and remedy.
        """
        self.offenders = tuple(offenders)
        lines = "\n".join(f"  - {offender}" for offender in offenders)
        super().__init__(f"The curvature of this model cannot be extracted as asked:\n{lines}")


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


def find_layers(model: nn.Module) -> tuple[Layer, ...]:
    """Groups all parameters of a model into layers, each parameter exactly once.

    Args:
        model: any module; nothing about it is changed.

    Returns:
        The layers, in the order of ``model.named_parameters()``.

    Raises:
        UnsupportedModelError: if parameters are tied, frozen, empty or not yet initialised; all
            are named at once.
    """
    offenders = _unusable(model)
    if not any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        offenders += _tied(model)
    if offenders:
        raise UnsupportedModelError(offenders)
    layers = []
    for path, module in model.named_modules():
        own = dict(module.named_parameters(prefix=path, recurse=False))
        shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
        weight, bias = (f"{path}.{leaf}".lstrip(".") for leaf in ("weight", "bias"))
        if set(shapes) == {weight, bias} and shapes[bias] == shapes[weight][:1]:
            layers.append(Layer(path or weight, ((weight, shapes[weight]), (bias, shapes[bias]))))
        elif set(shapes) == {weight}:
            layers.append(Layer(path or weight, ((weight, shapes[weight]),)))
        else:
            layers.extend(Layer(name, ((name, shape),)) for name, shape in shapes.items())
    if not layers:
        raise UnsupportedModelError(["the model has no parameters"])
    return tuple(layers)


def require_support(
    model: nn.Module, layers: Iterable[Layer], why_not: Callable[[nn.Module], str | None]
) -> None:
    """Refuses a model with layers that a kind of curvature does not cover.

    Args:
        model: the model the layers were found in.
        layers: from `find_layers`.
        why_not: tells why a module is not supported, or None if it is.

    Raises:
        UnsupportedModelError: naming every layer refused.
    """
    offenders = []
    for layer in layers:
        module = model.get_submodule(layer.module_name)
        if reason := why_not(module):
            names = ", ".join(layer.parameter_names)
            offenders.append(f"{names} of {type(module).__name__}: {reason}")
    if offenders:
        raise UnsupportedModelError(offenders)


def require_single_use(model: nn.Module, output: Tensor) -> None:
    """Refuses parameters that an output depends on in more than one way.

    Args:
        model: the model, all its parameters requiring gradients.
        output: computed by it, with its graph.

    Raises:
        UnsupportedModelError: naming every parameter used more than once, for example by its module
            and by a function.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    uses: dict[str, int] = {}
    pending, seen = [output.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            leaf = getattr(following, "variable", None)
            if id(leaf) in names:
                uses[names[id(leaf)]] = uses.get(names[id(leaf)], 0) + 1
            pending.append(following)
    offenders = [
        f"{name} is used {count} times in one forward pass: its curvature needs exactly one use"
        for name, count in sorted(uses.items())
        if count > 1
    ]
    if offenders:
        raise UnsupportedModelError(offenders)


def no_gradient_reaches(names: Iterable[str]) -> list[str]:
    """One line for each layer that the model's output does not depend on.

    Args:
        names: of the layers.

    Returns:
        Offenders for an `UnsupportedModelError`.
    """
    return [
        f"{name}: no gradient reaches it from the logits (it is detached, or its output is not "
        "used); make it a part of them, or take it out of the module"
        for name in sorted(names)
    ]


def is_plain(module: nn.Module, types: Iterable[type[nn.Module]]) -> bool:
    """Whether a module computes what one of the types computes.

    Args:
        module: any module.
        types: module types; a subclass counts unless it has a forward pass of its own.

    Returns:
        True if it does.
    """
    return any(isinstance(module, t) and type(module).forward is t.forward for t in types)


def same_padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[tuple[int, int], ...]:
    """Zeros that a convolution adds before and after, for each spatial dimension.

    Args:
        module: a convolution; its padding may be a word.

    Returns:
        A pair for each dimension; ``"same"`` with an even kernel adds one more after than before.
    """
    if not isinstance(module.padding, str):
        return tuple((int(p), int(p)) for p in module.padding)
    total = [
        d * (k - 1) if module.padding == "same" else 0
        for d, k in zip(module.dilation, module.kernel_size, strict=True)
    ]
    return tuple((t // 2, t - t // 2) for t in total)


def _tied(model: nn.Module) -> list[str]:
    """One line for each group of names that share memory."""
    spans = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
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
        f"{' and '.join(group)} are tied: their curvature is not the sum of two layers'; untie them"
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
        elif not parameter.requires_grad:
            offenders.append(
                f"{name} is frozen: unfreeze it, or make it a buffer if it is a constant"
            )
    return offenders
