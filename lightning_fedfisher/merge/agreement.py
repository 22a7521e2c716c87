"""Whether clients compute so differently that their merge can be of little use.

A merge finds the weights that change least of what clients compute. Where little is left all the
same, layers that read the outputs get what no client has seen, and were merged for other inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_fedfisher._utils.text import terminal_text
from lightning_fedfisher.curvature.registry import KINDS
from lightning_fedfisher.merge.layer_state import LayerState
from lightning_fedfisher.merge.methods import MergeMethod
from lightning_fedfisher.update.header import UpdateHeader

LEAST_AGREEMENT = 0.6
"""What a hidden layer keeps at least in a merge that nobody is warned of.

The first layer of a ResNet18 that was trained from scratch kept less, and its merges were far from
its clients' ensemble. LeNets, small residual networks and fine-tuned transformers, whose merges are
good, kept more in every layer. So did a vision transformer from scratch, whose merges are poor.
"""


def describe_disagreement(
    method: MergeMethod, header: UpdateHeader, states: Sequence[LayerState]
) -> str:
    """Tells in how many layers little is left of what clients compute.

    Layers that may have started at zero, of which any step leaves little in common, are not looked
    at: the output layer, and those that multiply by no matrix, such as tokens and scales. Nor are
    least-squares fits, which are to differ.

    Args:
        method: The merge method.
        header: Header of any update.
        states: The state of every layer.

    Returns:
        One sentence with the layer that keeps least and a remedy; empty if there is nothing to
        tell, or the method reads no curvature.
    """
    if method.ignores_curvature or header.fit is not None:
        return ""
    hidden = [
        (state.agreement, layer.name)
        for layer, state in zip(header.layers, states, strict=True)
        if state.done
        and layer.name != header.output_layer
        and not KINDS[header.kinds[layer.name]].elementwise
    ]
    apart = [found for found in hidden if found[0] < LEAST_AGREEMENT]
    if not apart:
        return ""
    least, name = min(apart)
    name = terminal_text(name)
    return (
        f"in {len(apart)} of {len(hidden)} hidden layers the merged weights keep less than "
        f"{LEAST_AGREEMENT:.0%} of what the clients' own compute (least: {name}, {least:.0%}), and "
        "layers that read their outputs get what no client saw: let clients start from the same "
        "pre-trained network, train fewer epochs, or fit heads in closed form "
        "(closed_form_head=True)"
    )
