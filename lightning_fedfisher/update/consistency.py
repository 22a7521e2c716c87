"""Whether a header and the tensors that it speaks of contradict each other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from typing import get_args

from lightning_fedfisher._utils.text import shortened
from lightning_fedfisher.batch_norms import buffer_names
from lightning_fedfisher.curvature.input_gram import InputGram
from lightning_fedfisher.curvature.registry import KINDS, KINDS_OF
from lightning_fedfisher.layers import Activation, Layer
from lightning_fedfisher.likelihoods.registry import LIKELIHOODS
from lightning_fedfisher.update.header import UpdateHeader
from lightning_fedfisher.update.safetensors_layout import MAX_NAME

_MAX_SAMPLES = 2**40  # of 8,192 clients with so many, the sum is still exact in float64


def inconsistencies(header: UpdateHeader, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Finds every way in which a header and its tensors contradict each other.

    Args:
        header: Header of an update.
        shapes: Shape of each tensor as it lies in the file, by name.

    Returns:
        One line for each contradiction; none if there is none.

    Example:
        >>> header = UpdateHeader(0, "identity", "", "categorical", 0, layers=(), kinds={})
        >>> inconsistencies(header, shapes={})
        ['num_samples is 0: an empty client has no say']
    """
    offenders = _count_problems(header)
    offenders += [
        f"{shortened(name)} has a name of {len(name)} characters, more than {MAX_NAME}"
        for name in shapes
        if len(name) > MAX_NAME
    ]
    if header.likelihood not in LIKELIHOODS:
        names = ", ".join(LIKELIHOODS)
        offenders.append(f"the likelihood is {header.likelihood!r}, not one of {names}")
    expected, problems = _promised_shapes(header)
    offenders += problems
    for name, first in header.aliases.items():
        known = f"parameters/{first}" in expected or f"buffers/{first}" in shapes
        taken = f"parameters/{name}" in expected or f"buffers/{name}" in shapes
        if not known or taken or name in header.frozen:
            offenders.append(f"{name} cannot be another name of {first}")
    offenders += [
        f"{name} is frozen and trained"
        for name in header.frozen
        if f"parameters/{name}" in expected
    ]
    offenders += [
        f"{name} is a buffer, and a parameter too"
        for name in (n.removeprefix("buffers/") for n in shapes if n.startswith("buffers/"))
        if f"parameters/{name}" in expected or name in header.frozen
    ]
    offenders += _wiring_problems(header)
    promised, problems = _promised_means(header, shapes)
    expected |= promised
    offenders += problems
    if header.fit is not None and list(header.kinds.values()) != [InputGram.kind]:
        offenders.append("a fit is told, and there is more than one layer's input_gram")
    packable = {name for name in expected if not name.startswith("input_means/")}
    offenders += [f"{n} is packed and unknown" for n in header.quantized if n not in packable]
    found = {name: shape for name, shape in shapes.items() if not name.startswith("buffers/")}
    for name in sorted(expected.keys() | found.keys()):
        if name in header.quantized and len(found.get(name, ())) == 1:
            continue  # bytes, whose number is found wrong when they are decoded
        if expected.get(name) != found.get(name):
            offenders.append(
                f"{name} should be {expected.get(name, 'absent')}, is {found.get(name, 'absent')}"
            )
    return offenders


def _count_problems(header: UpdateHeader) -> list[str]:
    """Finds numbers of samples that no client can have."""
    offenders = []
    if header.num_samples < 1:
        offenders.append(f"num_samples is {header.num_samples}: an empty client has no say")
    if header.curvature_samples < 0:
        offenders.append(f"curvature_samples is {header.curvature_samples}")
    for name in ("num_samples", "curvature_samples"):
        if getattr(header, name) > _MAX_SAMPLES:
            offenders.append(f"{name} is more than {_MAX_SAMPLES}: nobody holds so many")
    return offenders


def _promised_shapes(header: UpdateHeader) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Lists the shape of each tensor of the layers, and what is wrong with the layers."""
    expected: dict[str, tuple[int, ...]] = {}
    names = [layer.name for layer in header.layers]
    offenders = [f"two layers are named {name}" for name, n in Counter(names).items() if n > 1]
    for layer in header.layers:
        kind = KINDS.get(header.kinds.get(layer.name, "missing"))
        if kind is None:
            offenders.append(
                f"layer {layer.name}: unknown curvature {header.kinds.get(layer.name)}"
            )
            continue
        if kind.kind not in KINDS_OF.get(header.curvature, ()):
            offenders.append(f"layer {layer.name}: {kind.kind} is not {header.curvature} curvature")
        if not _forms_a_matrix(layer):
            offenders.append(f"layer {layer.name}: its parameters form no matrix")
            continue
        for name, shape in layer.parameters:
            if f"parameters/{name}" in expected:
                offenders.append(f"parameter {name} belongs to two layers")
            expected[f"parameters/{name}"] = shape
        try:
            parts = kind.tensor_shapes(layer.shape, layer.kernel)
        except ValueError as error:
            offenders.append(f"layer {layer.name}: {error}")
            continue
        expected |= {f"curvature/{layer.name}/{part}": shape for part, shape in parts.items()}
    return expected, offenders


def _wiring_problems(header: UpdateHeader) -> list[str]:
    """Finds what is wrong with `fed_by` and `output_layer`."""
    layers = {layer.name: layer for layer in header.layers if _forms_a_matrix(layer)}
    offenders = []
    if header.output_layer and header.output_layer not in layers:
        offenders.append(f"the output layer {header.output_layer} is no layer")
    for name, source in header.fed_by.items():
        if name not in layers or source.layer not in layers:
            offenders.append(f"layer {name} cannot read {source.layer}: one of them is no layer")
        elif source.activation not in get_args(Activation):
            offenders.append(f"layer {name}: unknown activation {source.activation}")
        elif layers[name].inputs % layers[source.layer].shape[0]:
            offenders.append(f"layer {name} cannot read {source.layer}: its inputs do not divide")
    try:
        TopologicalSorter({n: [source.layer] for n, source in header.fed_by.items()}).prepare()
    except CycleError as error:
        offenders.append(f"layer {error.args[1][0]} reads its own outputs")
    return offenders


def _promised_means(
    header: UpdateHeader, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Lists the shapes of the means of inputs, and what is wrong with `normalized`."""
    layers = {layer.name: layer for layer in header.layers if _forms_a_matrix(layer)}
    expected: dict[str, tuple[int, ...]] = {}
    offenders = []
    for path, norm in header.normalized.items():
        layer = layers.get(norm.layer)
        if layer is None:
            offenders.append(f"{path} cannot normalise {norm.layer}, which is no layer")
            continue
        rows, columns = layer.shape
        wrong = [n for n in buffer_names(path) if shapes.get(f"buffers/{n}") != (rows,)]
        if wrong:
            offenders.append(f"{path} cannot normalise {norm.layer}: {' and '.join(wrong)}")
        if norm.groups < 1 or rows % norm.groups:
            offenders.append(f"layer {norm.layer} has {rows} outputs, and {norm.groups} groups")
            continue
        known = expected.setdefault(f"input_means/{norm.layer}", (norm.groups, columns))
        if known[0] != norm.groups:
            offenders.append(f"layer {norm.layer} has {known[0]} groups, and {norm.groups}")
    return expected, offenders


def _forms_a_matrix(layer: Layer) -> bool:
    """Tells whether a stranger's layer has a matrix: all its parameters have the same rows."""
    if not layer.parameters:
        return False
    rows = math.prod(layer.parameters[0][1][:1])
    return all(math.prod(shape) % rows == 0 for _, shape in layer.parameters)
