"""Extraction: one pass over the client's samples turns a trained model into curvature.

The extractors (`kfac.py`, `per_sample.py`) only add up second moments of what is back-propagated;
this file decides what is back-propagated, over which samples, on what copy of the model. The user's
module is never touched: everything runs on a deep copy in eval mode, in float32 or better.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from tqdm import tqdm

from lightning_fedfisher.curvature import Curvature, Identity
from lightning_fedfisher.kfac import KroneckerSums
from lightning_fedfisher.layers import (
    Layer,
    UnsupportedModelError,
    find_layers,
    require_single_use,
    require_support,
)
from lightning_fedfisher.likelihood import (
    FISHER_TYPES,
    LIKELIHOODS,
    FisherType,
    LikelihoodType,
    residual_directions,
)
from lightning_fedfisher.per_sample import DenseSums, DiagonalSums
from lightning_fedfisher.sampling import Shard, deal_samples

CurvatureType = Literal["identity", "diagonal", "kfac", "dense"]
Forward = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor]]

CURVATURE_TYPES: tuple[CurvatureType, ...] = get_args(CurvatureType)
_LABEL_KEYS = ("label", "labels", "target", "targets", "y")


class _Sums(Protocol):
    """What an extractor offers: additive state, divided once at the end."""

    sums: dict[str, dict[str, Tensor]]

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None: ...
    def add(self, logits: Tensor, directions: Tensor) -> None: ...
    @staticmethod
    def why_not(module: nn.Module) -> str | None: ...
    @staticmethod
    def finish(layer: Layer, sums: dict[str, Tensor], count: int) -> Curvature: ...


_EXTRACTORS: dict[str, type[_Sums]] = {
    "diagonal": DiagonalSums,
    "kfac": KroneckerSums,
    "dense": DenseSums,
}


@dataclass(frozen=True)
class ExtractedCurvature:
    """The curvature of a trained model.

    Attributes:
        layers: the layers of the model, which cover each parameter exactly once.
        blocks: the curvature of each layer, by layer name.
        num_samples: samples the curvature is averaged over, over all processes.
        population: samples the client holds; None where the loader cannot tell.
        seconds: wall-clock time of the extraction.
    """

    layers: tuple[Layer, ...]
    blocks: Mapping[str, Curvature]
    num_samples: int
    population: int | None
    seconds: float

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the parameters covered, in the order of the layers."""
        return tuple(name for layer in self.layers for name in layer.parameter_names)


def check_options(curvature: str, fisher: str, likelihood: str) -> None:
    """Refuses unknown options, all at once.

    Raises:
        ValueError: naming each unknown option and what is known.
    """
    wrong = [
        f"{name}={given!r} is not one of {', '.join(known)}"
        for name, given, known in (
            ("curvature", curvature, CURVATURE_TYPES),
            ("fisher", fisher, FISHER_TYPES),
            ("likelihood", likelihood, LIKELIHOODS),
        )
        if given not in known
    ]
    if wrong:
        raise ValueError("; ".join(wrong))


def check_model(model: nn.Module, curvature: CurvatureType) -> tuple[Layer, ...]:
    """Finds the layers of a model and refuses what the kind of curvature does not cover.

    Args:
        model: any module; nothing about it is changed.
        curvature: the kind to be extracted.

    Returns:
        The layers.

    Raises:
        UnsupportedModelError: naming every tied, frozen, empty or unsupported parameter.
    """
    layers = find_layers(model)
    if curvature in _EXTRACTORS:
        require_support(model, layers, _EXTRACTORS[curvature].why_not)
    return layers


def extract_curvature(
    model: nn.Module,
    dataloader: Iterable[Any],
    kind: CurvatureType = "kfac",
    *,
    fisher: FisherType = "normalised",
    likelihood: LikelihoodType = "categorical",
    max_samples: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    mc_samples: int = 1,
    forward: Forward | None = None,
    prepare: Callable[[Any], Any] | None = None,
    shard: Shard | None = None,
    progress: bool = True,
) -> ExtractedCurvature:
    """Extracts the curvature of the loss around a trained model.

    Args:
        model: maps the first element of a batch to logits, unless `forward` says otherwise. It is
            left as it was: weights, gradients, hooks, mode, devices and random state.
        dataloader: batches ``(x, y)`` of the client's own training samples, un-augmented if
            possible. A `DataLoader` is read once through, each sample once, in a fixed order.
        kind: ``"identity"`` (no pass at all), ``"diagonal"``, ``"kfac"`` or ``"dense"``.
        fisher: ``"exact"``, ``"mc"``, ``"empirical"`` or ``"normalised"`` (see `likelihood`).
        likelihood: of the labels given the logits; ``"categorical"``.
        max_samples: average over a seeded random subset of this size; all samples if None.
        batch_size: samples a batch; the loader's own if None.
        seed: of the subset and of the Monte-Carlo draws.
        mc_samples: draws a sample for ``fisher="mc"``.
        forward: maps ``(module, batch)`` to logits, or to ``(logits, labels)``.
        prepare: applied to each batch first, where the loader's are not what the model is given.
        shard: this process's place among several; sums are reduced once at the end.
        progress: show a progress bar, after two seconds, on rank 0 and on a terminal.

    Returns:
        The curvature of every layer, averaged over the samples, on the model's device.

    Raises:
        UnsupportedModelError: if a parameter would be left out or counted wrongly.
        ValueError: if an option, a batch or the model's output is unusable.
    """
    check_options(kind, fisher, likelihood)
    if mc_samples < 1:
        raise ValueError(f"mc_samples must be at least 1, got {mc_samples}")
    shard = shard or Shard()
    layers = check_model(model, kind)
    started = time.perf_counter()
    samples = deal_samples(
        dataloader, max_samples=max_samples, batch_size=batch_size, seed=seed, shard=shard
    )
    if kind == "identity":
        identity = {layer.name: Identity(layer.shape) for layer in layers}
        return ExtractedCurvature(layers, identity, 0, samples.population, 0.0)
    count = 0
    with (
        _isolated(model),
        tqdm(
            desc=f"{fisher} {kind} curvature",
            total=samples.count,
            unit=" samples",
            delay=2,
            # None: shown on a terminal only.
            disable=None if progress and shard.rank == 0 else True,
        ) as bar,
    ):
        replica = _replicate(model)
        for buffer in replica.buffers():
            # Under DDP running statistics differ, and the first process's are sent.
            buffer.copy_(shard.first(buffer))
        calls = _CallCounter(replica, layers)
        extractor: _Sums | None = None
        uniforms = samples.uniforms(mc_samples, seed)
        for batch in samples.batches:
            batch = batch if prepare is None else prepare(batch)
            if extractor is None:  # the extractor's hooks would hide parts of the graph
                logits, _ = _run(replica, batch, forward)
                calls.check(len(logits))
                require_single_use(replica, logits)
                extractor = _EXTRACTORS[kind](replica, layers)
            logits, labels = _run(replica, batch, forward)
            calls.check(len(logits))
            count += len(logits)
            if samples.indices is not None and count > len(samples.indices):
                raise ValueError(
                    "the model gives more rows of logits than there are samples: pass `forward` to "
                    "return one row for each sample"
                )
            draws = uniforms(len(logits)) if fisher == "mc" else None
            extractor.add(logits, residual_directions(logits, labels, fisher, draws))
            calls.check_quiet()
            bar.update(len(logits) * shard.world_size)
            if samples.count is None and max_samples is not None and count >= max_samples:
                break
        # A rank without samples takes part in the sums.
        extractor = extractor or _EXTRACTORS[kind](replica, layers)
    device = next(replica.parameters()).device
    count = int(shard.total(torch.tensor(count, device=device)))
    if count == 0:
        raise ValueError("the client holds no samples: there is no curvature to extract")
    blocks: dict[str, Curvature] = {}
    for layer in layers:
        totals = {name: shard.total(t) for name, t in extractor.sums[layer.name].items()}
        blocks[layer.name] = extractor.finish(layer, totals, count)
    return ExtractedCurvature(
        layers, blocks, count, samples.population, time.perf_counter() - started
    )


def _replicate(model: nn.Module) -> nn.Module:
    """A copy to work on, in eval mode and at least float32; hooks and graphs die with it."""
    try:
        replica = copy.deepcopy(model)
    except RuntimeError as error:
        error.add_note(
            "Curvature is extracted on a deep copy of the module, and it cannot be copied. Most "
            "often a tensor that still hangs in a graph is kept as an attribute: detach it."
        )
        raise
    replica.zero_grad(set_to_none=True)
    low_precision = {p.dtype for p in replica.parameters()} & {torch.float16, torch.bfloat16}
    return (replica.float() if low_precision else replica).eval()


@contextmanager
def _isolated(model: nn.Module) -> Iterator[None]:
    """Gradients on, autocast off, and every random state put back afterwards."""
    device = next(model.parameters()).device
    python_state, numpy_state = random.getstate(), np.random.get_state()
    cuda = [device] if device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(cuda),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _run(model: nn.Module, batch: Any, forward: Forward | None) -> tuple[Tensor, Tensor | None]:
    """Logits and labels of a batch, on the model's device and in its precision."""
    like = next(model.parameters())

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)

    batch = apply_to_collection(batch, Tensor, move)
    if forward is None:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ValueError(
                f"a batch is {type(batch).__name__}, not a pair (x, y): pass `forward`, a function "
                "of (module, batch) that returns logits, or (logits, labels)"
            )
        forward = _forward_pair
    try:
        output = forward(model, batch)
    except RuntimeError as error:
        if "BackwardHookFunction" not in str(error):
            raise
        raise UnsupportedModelError(
            [
                "a layer's output is changed in place, which BackPACK does not allow: use the "
                "out-of-place form (functional.relu(x), x = x + y)"
            ]
        ) from error
    logits, labels = output if isinstance(output, tuple) else (output, _labels_of(batch))
    if not isinstance(logits, Tensor) or not logits.requires_grad:
        raise ValueError(
            "the model's output is no tensor with a gradient: pass `forward` to return its logits, "
            "and compute them outside torch.no_grad()"
        )
    return logits, labels


def _forward_pair(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model(batch[0]), batch[1]


def _labels_of(batch: Any) -> Tensor | None:
    """The labels of a batch, where its form tells; Fisher types that need none go without."""
    found: Any = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in _LABEL_KEYS if key in batch), None)
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        found = batch[1]
    return found if isinstance(found, Tensor) else None


class _CallCounter:
    """Refuses modules that do not run once, with gradients, on one row for each sample.

    Their blocks would be wrong without any sign of it.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        self._inputs: dict[str, list[Any]] = {layer.name: [] for layer in layers}
        for layer in layers:
            module = model.get_submodule(layer.module_name)
            module.register_forward_pre_hook(self._record(layer))

    def _record(self, layer: Layer) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if torch.is_grad_enabled():
                self._inputs[layer.name].append(len(inputs[0]) if inputs else None)

        return record

    def check_quiet(self) -> None:
        """Raises if a layer ran during a backward pass."""
        offenders = [
            f"{name} ran again in the backward pass: switch gradient checkpointing off"
            for name, rows in self._inputs.items()
            if rows
        ]
        if offenders:
            raise UnsupportedModelError(offenders)

    def check(self, samples: int) -> None:
        """Raises unless every layer ran as it must since the last check."""
        offenders = []
        for name, rows in self._inputs.items():
            if len(rows) != 1:
                offenders.append(
                    f"{name} ran {len(rows)} times with gradients in one forward pass: its "
                    "curvature needs exactly one call"
                )
            elif rows[0] is None:
                offenders.append(f"{name} is called by keyword: pass its input by position")
            elif rows[0] != samples:
                offenders.append(
                    f"the input of {name} has {rows[0]} rows for {samples} samples: its first "
                    "dimension must be the samples"
                )
        if not any(self._inputs.values()):
            offenders = [
                "no layer of the module's copy ran: its forward pass is tied to the original, as "
                "torch.compile and functions set on an instance do, or runs without gradients; fit "
                "it uncompiled, or define forward in the class"
            ]
        self._inputs = {name: [] for name in self._inputs}
        if offenders:
            raise UnsupportedModelError(offenders)
