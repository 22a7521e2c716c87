"""Multi-head attention, opened so that all of its linear maps are seen.

`torch.nn.functional.multi_head_attention_forward` leaves for an override before it calls them, if
one of its arguments has a torch function. And unless queries, keys and values are one tensor, it
cuts the packed weight, or bias, into parts that belong to no layer.
"""

from __future__ import annotations

import inspect
import types
from typing import Any

from torch import Tensor
from torch.nn import functional

_attention = functional.multi_head_attention_forward
_SIGNATURE = inspect.signature(_attention)


def open_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Runs the code of `multi_head_attention_forward`, with weights and biases used as a whole.

    Args:
        *args: Its positional arguments.
        **kwargs: Its keyword arguments.

    Returns:
        What it returns.
    """
    bias = _SIGNATURE.bind(*args, **kwargs).arguments["in_proj_bias"]

    def project(q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        """Projects by the first three of the weights; the others are parts of the bias."""
        projected = tuple(map(functional.linear, (q, k, v), weights[:3]))
        if bias is None:
            return projected
        # A linear map of no features at all: the bias, wherever there is an input.
        nothing = bias.new_empty(len(bias), 0)
        return tuple(
            part + functional.linear(part[..., :0], nothing, bias).chunk(3, dim=-1)[place]
            for place, part in enumerate(projected)
        )

    replaced = {
        "has_torch_function": lambda relevant: False,
        "_in_projection_packed": _project_packed,
        "_in_projection": project,
    }
    code, defaults = _attention.__code__, _attention.__defaults__
    opened = types.FunctionType(code, {**vars(functional), **replaced}, argdefs=defaults)
    output: tuple[Tensor, Tensor | None] = opened(*args, **kwargs)
    return output


def _project_packed(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """Projects by one weight that has the rows of queries, keys and values."""
    # All rows, of which some are not needed: no gradient comes back to these.
    different = {id(x): functional.linear(x, weight, bias) for x in dict.fromkeys((q, k, v))}
    return tuple(
        different[id(x)].chunk(3, dim=-1)[place].contiguous() for place, x in enumerate((q, k, v))
    )
