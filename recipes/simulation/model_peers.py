"""K-FAC of other libraries, of one label drawn for each sample, on networks of any kind.

`pip install nngeometry==0.4 curvlinops-for-pytorch`. They support linear layers and ungrouped
convolutions, so they are given those alone, which is less work than all layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader


def supported(network: nn.Module) -> dict[str, nn.Module]:
    """Finds the layers that other libraries have K-FAC for.

    Args:
        network: any network.

    Returns:
        Its trained linear layers and ungrouped convolutions by name.
    """
    return {
        name: module
        for name, module in network.named_modules()
        if type(module) in (nn.Linear, nn.Conv2d)
        and getattr(module, "groups", 1) == 1
        and all(weight.requires_grad for weight in module.parameters())
    }


def _curvlinops(approximation: str) -> Callable[[nn.Module, DataLoader[Any], int], None]:
    def run(network: nn.Module, loader: DataLoader[Any], positions: int) -> None:
        from curvlinops import KFACLinearOperator

        weights = [weight for m in supported(network).values() for weight in m.parameters()]
        KFACLinearOperator(
            network,
            nn.CrossEntropyLoss(),
            weights,
            loader,
            fisher_type="mc",
            kfac_approx=approximation,
            check_deterministic=False,
            num_data=len(loader.dataset),  # type: ignore[arg-type]
            num_per_example_loss_terms=positions,
        ).compute_kronecker_factors()

    return run


def _nngeometry(network: nn.Module, loader: DataLoader[Any], positions: int) -> None:
    from nngeometry.layercollection import LayerCollection
    from nngeometry.metrics import FIM_MonteCarlo
    from nngeometry.object import PMatKFAC

    layers = LayerCollection()
    for module in supported(network).values():
        layers.add_layer_from_model(network, module)

    def logits(x: Tensor, _: Tensor) -> Tensor:
        found: Tensor = network(x)
        # It knows positions as pixels alone.
        return found.unsqueeze(-1) if found.ndim == 3 else found

    FIM_MonteCarlo(
        network,
        loader,
        PMatKFAC,
        variant="segmentation_logits" if positions > 1 else "classif_logits",
        function=logits,
        layer_collection=layers,
    )


_RUNS: dict[str, Callable[[nn.Module, DataLoader[Any], int], None]] = {
    "curvlinops, expand": _curvlinops("expand"),
    "curvlinops, reduce": _curvlinops("reduce"),
    "NNGeometry": _nngeometry,
}

PEERS = tuple(_RUNS)
"""The names of libraries and their approximations."""


def run_peer(name: str, network: nn.Module, loader: DataLoader[Any]) -> tuple[float, float]:
    """Computes K-FAC with another library.

    Args:
        name: one of `PEERS`.
        network: in eval mode.
        loader: over the samples.

    Returns:
        Seconds of the processor, and the share of the trained weights that were covered.
    """
    weights = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    layers = supported(network).values()
    covered = {id(weight): weight.numel() for m in layers for weight in m.parameters()}
    with torch.no_grad():
        logits = network(next(iter(loader))[0][:1])
    started = time.process_time()
    _RUNS[name](network, loader, logits[0, 0].numel())
    return time.process_time() - started, sum(covered.values()) / weights
