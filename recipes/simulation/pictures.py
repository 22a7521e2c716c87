"""Pictures of a federation: who holds what, how accurate each method is, how the merge went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.patches import Patch

# Okabe and Ito's palette, told apart by the colour-blind.
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"
_LINES = [_ORANGE, _GREEN, _BLUE, "#CC79A7", "#E69F00"]


def draw_partition(histogram: np.ndarray, path: Path) -> Path:
    """Draws how many samples of each class each client holds.

    Args:
        histogram: counts of shape ``(clients, classes)``.
        path: PNG to write.

    Returns:
        The path.
    """
    clients, classes = histogram.shape
    figure, axes = plt.subplots(figsize=(2.5 + 0.5 * min(classes, 24), 1.4 + 0.45 * clients))
    picture = axes.imshow(histogram, cmap="Blues", aspect="auto")
    if classes <= 24:
        for client, klass in np.ndindex(histogram.shape):
            dark = histogram[client, klass] > histogram.max() / 2
            axes.text(
                klass,
                client,
                str(histogram[client, klass]),
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else "black",
            )
    axes.set_xlabel("class")
    axes.set_yticks(
        range(clients), [f"client {k} ({n:,})" for k, n in enumerate(histogram.sum(axis=1))]
    )
    axes.set_xticks(range(0, classes, max(1, classes // 12)))
    axes.set_title("Samples of each class that each client holds")
    figure.colorbar(picture, label="samples")
    return _save(figure, path)


def draw_accuracies(results: Mapping[str, Any], path: Path) -> Path:
    """Draws the test accuracy of every method beside the clients' own.

    Args:
        results: as in ``results.json``.
        path: PNG to write.

    Returns:
        The path.
    """
    bars = [
        (name, row["accuracy"], row["server_labels"]) for name, row in results["methods"].items()
    ]
    bars.sort(key=lambda bar: bar[1])
    figure, axes = plt.subplots(figsize=(7, 1.6 + 0.45 * len(bars)))
    colours = [_ORANGE if labels else _BLUE for _, _, labels in bars]
    drawn = axes.barh([bar[0] for bar in bars], [bar[1] for bar in bars], color=colours)
    axes.bar_label(drawn, fmt="%.1f", label_type="center", color="white", weight="bold")
    lines = {
        "best single client": (results["best_client"]["accuracy"], ":"),
        "ensemble of all clients": (results["ensemble"]["accuracy"], "--"),
    }
    handles: list[Artist] = [
        axes.axvline(accuracy, color="black", linestyle=style, label=f"{name}, {accuracy:.1f}")
        for name, (accuracy, style) in lines.items()
    ]
    if any(labels for _, _, labels in bars):
        handles.append(Patch(color=_BLUE, label="needs no server data"))
        handles.append(Patch(color=_ORANGE, label="picks its iterate on labelled samples"))
    axes.set_xlim(0, 100)
    axes.set_xlabel("test accuracy, %")
    config = results["config"]
    axes.set_title(
        f"{config['dataset']}, {config['model']}, {config['clients']} clients, "
        f"alpha {config['alpha']:g}"
    )
    figure.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, frameon=False
    )
    return _save(figure, path)


def draw_merge_curves(histories: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> Path:
    """Draws how the residual of each iterative method falls, once all layers are begun.

    Args:
        histories: of each method, as `FisherMergeModule.history`.
        path: PNG to write.

    Returns:
        The path.
    """
    figure, axes = plt.subplots(figsize=(7, 4))
    colours = iter(_LINES)
    for method, history in histories.items():
        if history[-1]["iterations"] <= 1:
            continue  # a closed form has no curve
        # A method that aligns begins its layers one after the other, and has none to show before.
        begun = [entry for entry in history if entry["residual"] < 1] or history
        steps = [entry["iterations"] for entry in begun]
        residuals = [max(entry["residual"], 1e-8) for entry in begun]
        axes.plot(steps, residuals, marker=".", color=next(colours), label=method)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("solver iterations, the most of any layer")
    axes.set_ylabel("largest relative residual of a layer")
    axes.set_title("How far each merge is from its minimum")
    if axes.has_data():
        axes.legend(frameon=False)
    else:
        axes.text(0.5, 0.5, "every method has a closed form", ha="center", transform=axes.transAxes)
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return path
