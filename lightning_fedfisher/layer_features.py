"""Features for a head in closed form that a network computes on its way, before its last layer."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class LayerFeatures(nn.Module):
    """What several layers of a pre-trained network compute, each averaged over positions.

    The last features of a network are those of the task that it was trained for, and the smaller or
    stranger the images, the less they tell. The layers before hold more that other tasks can use,
    and a head in closed form finds it in the same forward pass (Evci et al., 2022, "Head2Toe:
    Utilizing Intermediate Representations for Better Transfer Learning"). Each layer's features are
    brought to one root mean square.

    Attributes:
        network: The network, without its own head.
        layers: Names of the layers.
        out_features: Number of features, of all layers together.

    Example:
        >>> body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3))
        >>> features = LayerFeatures(body, torch.rand(1, 3, 8, 8), layers=["0", "2"])
        >>> head = nn.Sequential(features, nn.Linear(features.out_features, 10))
        >>> features.out_features, head(torch.rand(2, 3, 8, 8)).shape
        (24, torch.Size([2, 10]))
    """

    def __init__(
        self,
        network: nn.Module,
        example: Any,
        layers: Sequence[str] | None = None,
        *,
        channel_dim: int | None = None,
        max_features: int = 2048,
    ) -> None:
        """Finds the layers, and counts their features by running a copy of the network.

        Args:
            network: With a layer of no weights where its head was, such as `torch.nn.Identity`. The
                same on all clients.
            example: Inputs of the network, of one sample or more.
            layers: Names of modules that run once in a forward pass; None takes the blocks of the
                network (`find_blocks`). Of those, blocks of more than half of `max_features` are
                left out, and of the others as many as it takes, at even distances.
            channel_dim: The dimension of the features in the layers' outputs; None takes the second
                of images, else the last, unless only another is as large as the layer's biases.
            max_features: Most features to choose; it does not bound layers that are named.

        Raises:
            ValueError: If a layer is missing, or not run exactly once, or if no blocks are found.
        """
        super().__init__()
        chosen = find_blocks(network) if layers is None else list(layers)
        modules = dict(network.named_modules())
        if missing := [name for name in chosen if name not in modules]:
            raise ValueError(f"the network has no layers {', '.join(missing)}")
        if not chosen:
            raise ValueError(
                f"{type(network).__name__} has no blocks of one kind: name the layers to take"
            )
        self.network, self.layers = network, tuple(chosen)
        shapes = self._shapes(example)
        self._dims = {
            name: _feature_dim(modules[name], shape) if channel_dim is None else channel_dim
            for name, shape in shapes.items()
        }
        sizes = {name: shape[self._dims[name]] for name, shape in shapes.items()}
        if layers is None:
            self.layers = _thinned(sizes, max_features)
        self.out_features = sum(sizes[name] for name in self.layers)

    @torch.no_grad()
    def _shapes(self, example: Any) -> dict[str, torch.Size]:
        """Tells the shape of what each layer gives, and leaves the network as it is."""
        probe = copy.copy(self)
        probe._modules = {"network": copy.deepcopy(self.network).eval()}
        with torch.random.fork_rng():
            return {name: output.shape for name, output in probe._run((example,), {}).items()}

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Computes the features.

        Args:
            *inputs: What the network takes.
            **named: The same, by names.

        Returns:
            Of shape ``(samples, out_features)``.
        """
        parts = list[Tensor]()
        for name, output in self._run(inputs, named).items():
            by_features = output.movedim(self._dims[name], 1).unsqueeze(2).flatten(2)
            mean = by_features.mean(2)
            # Layer normalisation would make features depend on each other, but for rounding.
            parts.append(functional.rms_norm(mean, mean.shape[1:]))
        return torch.cat(parts, dim=1)

    def _run(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Tensor]:
        """Runs the network, and keeps what each layer gives."""
        found: defaultdict[str, list[Tensor]] = defaultdict(list)

        def keep(name: str, module: nn.Module, given: Any, output: Any) -> None:
            found[name].append(output[0] if isinstance(output, tuple) else output)

        hooks = [
            self.network.get_submodule(name).register_forward_hook(partial(keep, name))
            for name in self.layers
        ]
        try:
            self.network(*inputs, **named)
        finally:
            for hook in hooks:
                hook.remove()
        if wrong := [f"{name} {len(found[name])}" for name in self.layers if len(found[name]) != 1]:
            raise ValueError(
                f"layers must run once in a forward pass, and ran otherwise: {', '.join(wrong)} "
                "times"
            )
        return {name: found[name][0] for name in self.layers}


def find_blocks(network: nn.Module) -> list[str]:
    """Names the blocks of a network: the modules of the kind that holds most of its weights.

    PyTorch's own kinds, as convolutions, are none, nor is what is made from them, but for
    `torch.nn.TransformerEncoderLayer`. There must be two blocks at least, and none is in another.

    Args:
        network: The network.

    Returns:
        Names, in the order of its modules; none if there is no such kind.

    Example:
        >>> from torchvision.models import resnet18
        >>> find_blocks(resnet18())[:3]
        ['layer1.0', 'layer1.1', 'layer2.0']
    """
    kinds: defaultdict[type[nn.Module], dict[str, int]] = defaultdict(dict)
    for name, module in network.named_modules():
        weights = sum(parameter.numel() for parameter in module.parameters())
        if name and weights and _may_be_a_block(module):
            kinds[type(module)][name] = weights
    blocks = [
        found
        for found in kinds.values()
        if len(found) > 1
        and not any(one.startswith(f"{other}.") for one in found for other in found)
    ]
    largest: dict[str, int] = max(blocks, key=lambda found: sum(found.values()), default={})
    return list(largest)


def _may_be_a_block(module: nn.Module) -> bool:
    """Whether a module is of somebody's own making, or a layer of a transformer."""
    made_from = (base for base in type(module).__mro__ if base.__module__.startswith("torch.nn."))
    return isinstance(module, nn.TransformerEncoderLayer) or (
        type(module) is not nn.Sequential and {*made_from} <= {nn.Module, nn.Sequential}
    )


def _feature_dim(layer: nn.Module, shape: torch.Size) -> int:
    """Finds the dimension of the features in what a layer gives."""
    usual = 1 if len(shape) > 3 else len(shape) - 1
    sizes = {len(parameter) for parameter in layer.parameters() if parameter.ndim == 1}
    fitting = [dim for dim in range(1, len(shape)) if shape[dim] in sizes]
    return usual if usual in fitting or not fitting else fitting[-1]


def _thinned(sizes: dict[str, int], most: int) -> tuple[str, ...]:
    """Takes layers at even distances, the last among them, that have no more features than that."""
    names = [name for name, size in sizes.items() if 2 * size <= most] or [[*sizes][-1]]
    for step in range(1, len(names)):
        taken = names[::-1][::step][::-1]
        if sum(sizes[name] for name in taken) <= most:
            return tuple(taken)
    return (names[-1],)
