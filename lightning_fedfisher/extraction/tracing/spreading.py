"""Follows parameters that no layer's function reads, up to where every sample gets a copy.

A class token, a position embedding or the scale of a layer is added to, or multiplied with, what
belongs to samples: broadcasting gives every sample the same copy, and the backward pass adds the
copies' gradients up. Written out before they are added up they are the per-sample gradients. So
broadcasting is made explicit: the parameter, reshaped and indexed as the model does, is expanded
over the samples by a call that can be watched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.nn import functional

from lightning_fedfisher.extraction.layer_types.spread import Rebuild


class Followed(NamedTuple):
    """A tensor that is computed from one parameter and from nothing that a sample has.

    Attributes:
        tensor: The tensor, or the parameter itself.
        parameter: The parameter.
        rebuild: Computes the tensor from the parameter.
        version: How often the tensor had been changed in place when it was computed.
    """

    tensor: Tensor
    parameter: Tensor
    rebuild: Rebuild
    version: int

    @property
    def is_current(self) -> bool:
        """Whether the tensor has not been changed since."""
        return self.tensor._version == self.version


class ParameterFollower:
    """Knows which tensors of a forward pass are computed from one of some parameters alone.

    Example:
        >>> parameter = torch.nn.Parameter(torch.ones(3))
        >>> follower = ParameterFollower([parameter])
        >>> found = parameter.exp()
        >>> follower.note(torch.exp, (parameter,), {}, found)
        >>> follower.meets(torch.add, (torch.zeros(2, 3), found), {})[1]
        torch.Size([2, 3])
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        """Begins with the parameters themselves.

        Args:
            parameters: Those that are followed.
        """
        self._parameters = parameters
        self.forget()

    def forget(self) -> None:
        """Begins anew, before a forward pass."""
        self._followed = {id(p): Followed(p, p, _same, p._version) for p in self._parameters}

    def note(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Any,
    ) -> None:
        """Follows the result of a call, if it is computed from one followed tensor alone.

        Args:
            func: A function that was called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            result: What it returned.
        """
        if not isinstance(result, Tensor) or _changes_in_place(func):
            return
        given = _tensors((args, kwargs))
        ours = self._among(given)
        if len(ours) != 1 or (len(given) > 1 and func not in _LOOKUPS):
            return
        (followed,) = ours
        own = followed.tensor
        if followed.parameter.requires_grad and not result.requires_grad:
            return  # detached, or of another type

        def rebuild(parameter: Tensor) -> Tensor:
            again = followed.rebuild(parameter)
            args_again, kwargs_again = apply_to_collection(
                (args, dict(kwargs)), Tensor, lambda t: again if t is own else t
            )
            found: Tensor = func(*args_again, **kwargs_again)
            return found

        version = result._version
        self._followed[id(result)] = Followed(result, followed.parameter, rebuild, version)

    def _among(self, tensors: Sequence[Tensor]) -> list[Followed]:
        """Those of some tensors that are followed."""
        found = [self._followed[id(t)] for t in tensors if id(t) in self._followed]
        return [followed for followed in found if followed.is_current]

    def meets(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Followed, torch.Size] | None:
        """Tells whether a call is where each sample gets its copy of a followed tensor.

        Args:
            func: A function that is about to be called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Returns:
            The followed tensor, and the shape that it is expanded to; None if the call is not such
            a place.
        """
        if func not in _ELEMENTWISE and func not in EXPANSIONS:
            return None
        given = _tensors((args, kwargs))
        ours = self._among(given)
        if len(ours) != 1:
            return None
        (own,) = ours
        if func in EXPANSIONS:
            shape = func(*args, **kwargs).shape
            shape = shape if shape == _broadcast(own.tensor.shape, shape) else None
        elif len(given) > 1:
            shape = _broadcast(*(t.shape for t in given))
        else:
            return None
        if shape is None:  # it takes more than broadcasting, or fails
            return None
        ndim = own.tensor.ndim
        # A batch of one sample is no exception: a call must be the same whatever the batch.
        spreads = len(shape) > ndim or (ndim > 0 and own.tensor.shape[0] == 1)
        return (own, shape) if spreads and shape else None


def spread(parameter: Tensor, rebuild: Rebuild, shape: Sequence[int]) -> Tensor:
    """Computes a tensor from a parameter, and gives every sample a copy.

    Args:
        parameter: The parameter.
        rebuild: Computes the tensor.
        shape: Shape to expand it to, samples first.
    """
    return rebuild(parameter).expand(tuple(shape))


def _same(parameter: Tensor) -> Tensor:
    return parameter


def _broadcast(*shapes: Sequence[int]) -> torch.Size | None:
    """The shape that tensors of some shapes are broadcast to; None if they cannot be."""
    try:
        shape: torch.Size = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    except RuntimeError:
        return None
    return shape


def _tensors(arguments: Any) -> list[Tensor]:
    """Collects the tensors among arguments: at every call, so without a library's generality."""
    if isinstance(arguments, Tensor):
        return [arguments]
    if isinstance(arguments, Mapping):
        arguments = arguments.values()
    elif not isinstance(arguments, tuple | list):
        return []
    return [tensor for argument in arguments for tensor in _tensors(argument)]


def _changes_in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


_ELEMENTWISE = {
    *(torch.add, torch.sub, torch.mul, torch.div, torch.where),
    *(torch.subtract, torch.multiply, torch.divide, torch.true_divide),
    *(
        getattr(Tensor, name)
        for stem in ("add", "sub", "mul", "div", "subtract", "multiply", "divide", "true_divide")
        for name in (stem, f"{stem}_")
    ),
    *(
        getattr(Tensor, f"__{how}{stem}__")
        for stem in ("add", "sub", "mul", "truediv")
        for how in ("", "r", "i")
        if hasattr(Tensor, f"__{how}{stem}__")
    ),
    Tensor.where,
}
EXPANSIONS = {
    *(Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to),
    *(Tensor.repeat, torch.tile, Tensor.tile),
}
"""Functions whose result is nothing but copies."""
# Whose further tensors are indices.
_LOOKUPS = {functional.embedding, Tensor.__getitem__, torch.index_select, Tensor.index_select}
