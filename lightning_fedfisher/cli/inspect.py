"""``fedfisher inspect``: what an update file holds, without reading all of it."""

from __future__ import annotations

import json
import math
from typing import Any

from jsonargparse import Namespace

from lightning_fedfisher._utils.text import shortened
from lightning_fedfisher.cli.terminal import columns, show
from lightning_fedfisher.curvature.registry import KINDS
from lightning_fedfisher.update.client_update import ClientUpdate

_PARTS = ("weights", "curvature")


def run(flags: Namespace) -> int:
    """Prints what an update file holds.

    Args:
        flags: ``file`` and ``json``.

    Returns:
        The exit status, 0.
    """
    update = ClientUpdate.open(flags.file)
    facts = _facts(update)
    if flags.json:
        print(json.dumps(facts, indent=2))
        return 0
    header = update.header
    about = f"{header.curvature} curvature"
    if header.fisher:
        about += f" ({header.fisher} Fisher of {header.curvature_samples} samples)"
    elif header.curvature_samples:  # of the inputs alone
        about += f" (of {header.curvature_samples} samples)"
    lines = [
        f"{update.source}: {header.num_samples} samples, {about}",
        f"{update.upload_bytes:,} bytes, {facts['fedavg_uploads']:.2f} of a FedAvg upload",
        f"digest {update.digest}",
        f"model  {update.model_fingerprint}",
        *(f"{name}: {value}" for name, value in sorted(header.metadata.items())),
        "",
    ]
    titles = ("layer", "kind", "shape", "weights", "bits", "curvature", "bits")
    rows = [titles]
    for layer in facts["layers"]:
        shape = "x".join(map(str, layer["shape"]))
        cells = [(f"{layer[p]['bytes']:,}", f"{layer[p]['bits']:.1f}") for p in _PARTS]
        rows.append((shortened(layer["name"]), layer["kind"], shape, *cells[0], *cells[1]))
    show(*lines, *columns(rows, "<<>>>>>"))
    return 0


def _facts(update: ClientUpdate) -> dict[str, Any]:
    """Collects the facts: bytes as stored, and bits for each number that they stand for."""
    header = update.header
    layers = []
    for layer in update.layers:
        kind = KINDS[header.kinds[layer.name]]
        numbers = sum(map(math.prod, kind.tensor_shapes(layer.shape, layer.kernel).values()))
        sent, curved = update.layer_bytes(layer)
        layers.append(
            {
                "name": layer.name,
                "kind": kind.kind,
                "shape": layer.shape,
                "weights": {"bytes": sent, "bits": 8 * sent / math.prod(layer.shape)},
                "curvature": {"bytes": curved, "bits": 8 * curved / max(numbers, 1)},
            }
        )
    return {
        "file": update.source,
        "bytes": update.upload_bytes,
        "fedavg_uploads": update.upload_bytes / max(update.fedavg_bytes, 1),
        "digest": update.digest,
        "model": update.model_fingerprint,
        "num_samples": header.num_samples,
        "curvature": header.curvature,
        "fisher": header.fisher,
        "likelihood": header.likelihood,
        "curvature_samples": header.curvature_samples,
        "output_layer": header.output_layer,
        "frozen": sorted(header.frozen),
        "buffers": {"bytes": update.sent_bytes("buffers")},
        "input_means": {"bytes": update.sent_bytes("input_means")},
        "metadata": dict(header.metadata),
        "layers": layers,
    }
