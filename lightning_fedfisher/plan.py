"""Plans a federation before anybody trains: what a kind of curvature takes, without data.

A model on the meta device will do, which has shapes and no weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_fedfisher._utils.unwrapping import unwrapped
from lightning_fedfisher.curvature.registry import KINDS, CurvatureType
from lightning_fedfisher.errors import FedFisherError
from lightning_fedfisher.extraction.layer_report import CURVATURE_TYPES, block_kind
from lightning_fedfisher.extraction.tracing.without_data import (
    LayerTypes,
    types_by_modules,
    types_by_running,
)
from lightning_fedfisher.layers import Layer, find_layers
from lightning_fedfisher.merge.memory_budget import (
    DEFAULT_MEMORY_BUDGET,
    MemoryBudget,
    factor_sides,
    peak_bytes,
    sent_bytes,
)
from lightning_fedfisher.update.header import UpdateHeader

# How many times the bytes of the weights a curvature may take without a word.
_MANY_TIMES = 3
# What takes less, and still tells more than an average; the first is the better one.
_SMALLER: tuple[CurvatureType, ...] = ("input_gram", "diagonal")
_NAMED_LAYERS = 2


@dataclass(frozen=True)
class LayerPlan:
    """What one layer takes.

    Attributes:
        layer: The layer.
        kind: Kind of its block, a key of `lightning_fedfisher.curvature.KINDS`.
        weights_bytes: Bytes of its weights, as trained.
        curvature_bytes: Bytes of its curvature, as extracted.
        factor_sides: Rows of each matrix that its curvature is decomposed by.

    Example:
        >>> plan_update(nn.Linear(3, 2)).layers[0].factor_sides
        (2, 4)
    """

    layer: Layer
    kind: str
    weights_bytes: int
    curvature_bytes: int
    factor_sides: tuple[int, ...]


@dataclass(frozen=True)
class UpdatePlan:
    """What extraction, upload and merge of a model take, in bytes and decompositions.

    Attributes:
        curvature: Kind of curvature that was planned for.
        layers: What each layer takes.
        ran: Whether the kinds are those of a forward pass on the meta device, rather than told by
            the types of the modules.
        buffer_bytes: Bytes of the model's buffers that are sent.
        clients: Number of clients.
        upload_budget: Most bytes of a file, in FedAvg uploads; None if nothing is rounded.
        memory_budget: Bytes of clients' weights and curvature that the server holds at a time.
        server_bytes: Peak memory of a merge in one process, estimated.
        advice: What to do where the curvature takes many times the weights' numbers; else empty.
    """

    curvature: CurvatureType
    layers: tuple[LayerPlan, ...]
    ran: bool
    buffer_bytes: int
    clients: int
    upload_budget: float | None
    memory_budget: int
    server_bytes: int
    advice: str = ""

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(planned.weights_bytes for planned in self.layers)

    @property
    def curvature_bytes(self) -> int:
        """Bytes of all curvature, as extracted."""
        return sum(planned.curvature_bytes for planned in self.layers)

    @property
    def client_bytes(self) -> int:
        """Memory that an extraction takes beside the training's own, activations apart.

        A copy of the model is run, and sums are added up. While it is traced there are gradients,
        of the weights' bytes; at the end there are sums and means, and one layer's sums once more,
        and of a diagonal the gradients that BackPACK leaves.
        """
        if self.curvature == "identity":
            return 0
        largest = max(planned.curvature_bytes for planned in self.layers)
        gradients = self.weights_bytes if self.curvature == "diagonal" else 0
        finishing = 2 * self.curvature_bytes + largest + gradients
        return self.weights_bytes + max(self.weights_bytes, finishing)

    @property
    def file_bytes(self) -> int:
        """Bytes of an update's tensors before it is compressed."""
        return self.weights_bytes + self.buffer_bytes + self.curvature_bytes

    @property
    def upload_bytes(self) -> int:
        """Bytes of an update as it is sent."""
        if self.upload_budget is None:
            return self.file_bytes
        fedavg = self.weights_bytes + self.buffer_bytes
        return min(self.file_bytes, int(self.upload_budget * fedavg))

    @property
    def largest(self) -> LayerPlan:
        """The layer with the largest factor, or with the most curvature if there is none."""
        return max(
            self.layers, key=lambda plan: (max(plan.factor_sides, default=0), plan.curvature_bytes)
        )

    @property
    def decomposition(self) -> int:
        """Sum of ``n^3`` over all factors of ``n`` rows: what one decomposition of each takes."""
        return sum(side**3 for planned in self.layers for side in planned.factor_sides)

    @property
    def report(self) -> str:
        """The plan in a few lines."""
        how = "a forward pass on the meta device" if self.ran else "the types of their modules"
        weights = sum(math.prod(planned.layer.shape) for planned in self.layers)
        lines = [
            f"{self.curvature} curvature of {len(self.layers)} layers, {weights:,} weights "
            f"({_size(self.weights_bytes)}), their kinds told by {how}:"
        ]
        by_kind: dict[str, list[LayerPlan]] = {}
        for planned in self.layers:
            by_kind.setdefault(planned.kind, []).append(planned)
        for kind, some in by_kind.items():
            nbytes = sum(planned.curvature_bytes for planned in some)
            names = ", ".join(planned.layer.name for planned in some[:_NAMED_LAYERS])
            names += ", ..." if len(some) > _NAMED_LAYERS else ""
            plural = "s" if len(some) > 1 else ""
            lines.append(f"  {kind}: {len(some)} layer{plural}, {_size(nbytes)}: {names}")
        sides = self.largest.factor_sides
        if sides:
            lines.append(
                f"largest factor: {max(sides):,} rows, {_size(4 * max(sides) ** 2)}, of "
                f"{self.largest.layer.name}; one decomposition of all: n^3 = "
                f"{self.decomposition:.1e}"
            )
        sent = _size(self.upload_bytes)
        budget = "as it is" if self.upload_budget is None else f"at budget {self.upload_budget:g}"
        lines += [
            f"client: {_size(self.client_bytes)} beside the training's own and activations",
            f"file: {_size(self.file_bytes)}; {sent} are sent ({budget})",
            f"server: about {_size(self.server_bytes)} for {self.clients} clients, with "
            f"{_size(self.memory_budget)} for their updates",
        ]
        return "\n".join([*lines, self.advice] if self.advice else lines)


def plan_update(
    model: nn.Module,
    curvature: CurvatureType = "kfac",
    *,
    forward: Callable[[nn.Module], Any] | None = None,
    clients: int = 10,
    upload_budget: float | None = 1.0,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> UpdatePlan:
    """Tells what a kind of curvature takes for a model, on clients and on the server.

    Args:
        model: The model, on any device; on the meta device it takes no memory. It is not changed.
        curvature: Kind of curvature to plan for.
        forward: Function that makes inputs and runs the model on them, such as
            ``lambda model: model(torch.zeros(1, 3, 224, 224))``. It is run on the meta device, and
            shows which operations use which weights. None goes by the types of the modules that
            hold them, which is wrong for a module whose weights are used in another way than its
            own ``forward`` uses them. Neither sees that a weight is used twice, once by an
            operation that is not known; an extraction gives such a layer a diagonal.
        clients: Number of clients whose updates a server merges.
        upload_budget: Most bytes of a file, in FedAvg uploads; None if nothing is to be rounded.
        memory_budget: Bytes of clients' weights and curvature that the server holds at a time.

    Returns:
        The plan. Its `report` tells all in a few lines, and what to use instead if the curvature
        takes many times the numbers of the weights.

    Raises:
        FedFisherError: If an option is unknown or out of range; all are named at once.
        UnsupportedModelError: If the model has no layers that could be planned for.
        ValueError: If the model does not run on the meta device.

    Example:
        >>> with torch.device("meta"):
        ...     model = nn.Sequential(nn.Linear(2048, 8192), nn.SiLU(), nn.Linear(8192, 2048))
        >>> plan = plan_update(model, "kfac")
        >>> plan.curvature_bytes / plan.weights_bytes > 4
        True
        >>> print(plan.advice)
        kfac takes 4.2 times the weights' numbers: curvature='input_gram' 2.1, 'diagonal' 1.0
    """
    _require_options(curvature, clients, upload_budget, memory_budget)
    model = unwrapped(model)
    layers = find_layers(model)
    if forward is None:
        types = types_by_modules(model, layers)
    else:
        types = types_by_running(model, layers, forward)
    kinds = _kinds(layers, types, curvature)
    header = UpdateHeader(1, curvature, "", "categorical", 0, layers, kinds)
    sizes = [sent_bytes(header, clients, layer) for layer in layers]
    parameters, persistent = dict(model.named_parameters()), model.state_dict().keys()
    planned = []
    for layer in layers:
        own = [parameters[name] for name in layer.parameter_names]
        width = torch.promote_types(own[0].dtype, torch.float32).itemsize
        planned.append(
            LayerPlan(
                layer,
                kinds[layer.name],
                weights_bytes=sum(parameter.nbytes for parameter in own),
                curvature_bytes=width * _numbers(layer, kinds[layer.name]),
                factor_sides=tuple(factor_sides(header, layer)),
            )
        )
    weights = sum(math.prod(layer.shape) for layer in layers)
    times = {
        other: sum(_numbers(layer, kind) for layer, kind in zip(layers, found, strict=True))
        / weights
        for other in (curvature, *_SMALLER)
        for found in [_kinds(layers, types, other).values()]
    }
    return UpdatePlan(
        curvature=curvature,
        layers=tuple(planned),
        ran=forward is not None,
        buffer_bytes=sum(b.nbytes for name, b in model.named_buffers() if name in persistent),
        clients=clients,
        upload_budget=upload_budget,
        memory_budget=memory_budget,
        server_bytes=peak_bytes(header, clients, MemoryBudget(memory_budget, sizes)),
        advice=_advise(curvature, times),
    )


def _require_options(
    curvature: str, clients: int, upload_budget: float | None, memory_budget: int
) -> None:
    """Refuses options that are unknown or out of range, all at once."""
    offenders = []
    if curvature not in CURVATURE_TYPES:
        offenders.append(f"curvature={curvature!r} is not one of {', '.join(CURVATURE_TYPES)}")
    if clients < 1:
        offenders.append(f"clients must be at least 1, got {clients}")
    if upload_budget is not None and not 0 < upload_budget < math.inf:
        offenders.append(f"upload_budget must be greater than 0 or None, got {upload_budget}")
    if memory_budget < 0:
        offenders.append(f"memory_budget must be at least 0 bytes, got {memory_budget}")
    if offenders:
        raise FedFisherError("This cannot be planned:", offenders)


def _kinds(layers: Sequence[Layer], types: LayerTypes, curvature: CurvatureType) -> dict[str, str]:
    """Gives the kind of each layer's block, by layer name."""
    return {layer.name: block_kind(curvature, types.get(layer.name), layer) for layer in layers}


def _numbers(layer: Layer, kind: str) -> int:
    """Counts the numbers of a layer's block."""
    return sum(map(math.prod, KINDS[kind].tensor_shapes(layer.shape, layer.kernel).values()))


def _advise(curvature: CurvatureType, times: Mapping[CurvatureType, float]) -> str:
    """Says what to extract instead of a curvature that takes many times the weights.

    Args:
        curvature: The curvature that was planned for.
        times: How many times as many numbers as weights it and others take.

    Returns:
        A line; empty if there is nothing to say.
    """
    if times[curvature] <= _MANY_TIMES:
        return ""
    told = f"{curvature} takes {times[curvature]:.1f} times the weights' numbers"
    less = [f"{k!r} {times[k]:.1f}" for k in _SMALLER if times[k] < times[curvature]]
    return f"{told}: curvature={', '.join(less)}" if less else told


def _size(nbytes: int) -> str:
    """Writes a number of bytes for people."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= scale:
            return f"{nbytes / scale:,.1f} {unit}"
    return f"{nbytes / 1e3:,.1f} kB"
