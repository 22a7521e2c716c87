"""Features for a head in closed form that a network computes on its way, before its last layer."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_fedfisher._utils.random_states import kept_random_states

_Read = TypeVar("_Read")
_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


class LayerFeatures(nn.Module):
    """What several layers of a pre-trained network compute, each averaged over positions.

    The last features of a network are those of the task that it was trained for, and the smaller or
    stranger the images, the less they tell. The layers before hold more that other tasks can use
    (Evci et al., 2022, "Head2Toe: Utilizing Intermediate Representations for Better Transfer
    Learning"), and a head in closed form finds it in the same forward pass. Each layer's features
    are brought to one root mean square. The update of such a head grows with the square of
    `out_features`.

    Everything but samples and features is averaged, positions of padding too: texts should be of
    one length. Weights behind the last of the layers have no effect, and a network that is trained
    further should not have them. A server refuses heads of clients that read other layers.

    Attributes:
        network: The network, without its own head.
        layers: Names of the layers.
        out_features: Number of features, of all layers together.
        layout: The layers' names and dimensions as bytes, for a server to compare.

    Example:
        >>> body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3))
        >>> features = LayerFeatures(body, torch.rand(1, 3, 8, 8), layers=["0", "2"])
        >>> head = nn.Sequential(features, nn.Linear(features.out_features, 10))
        >>> features.out_features, head(torch.rand(2, 3, 8, 8)).shape
        (24, torch.Size([2, 10]))
    """

    layout: Tensor

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
                same on all clients. To compile it, compile the whole model.
            example: What the network takes, for one sample or more.
            layers: Names of modules that run once in a forward pass, and give samples first; None
                takes the blocks of the network (`find_blocks`). Of those, blocks of more than half
                of `max_features` are left out, often the last, and of the others as many as it
                takes, at even distances.
            channel_dim: The dimension of the features in what the layers give; None takes the
                second of convolutions, and of images where nothing tells, else the last.
            max_features: Most features to choose, if one block does not have more by itself; it
                does not bound layers that are named.

        Raises:
            ValueError: If a layer is missing, does not run exactly once, or gives no tensor with
                samples first, or if no blocks are found.
        """
        super().__init__()
        chosen = find_blocks(network) if layers is None else list(dict.fromkeys(layers))
        modules = dict(network.named_modules())
        if missing := [name for name in chosen if name not in modules]:
            raise ValueError(f"the network has no layers {', '.join(missing)}")
        shapes = _shapes(network, chosen, example)
        if layers is None:  # heads beside the network's own may not run, or not in eval mode
            shapes = {name: found for name, found in shapes.items() if len(found) == 1}
        if not shapes:
            raise ValueError(
                f"{type(network).__name__} has no blocks of one kind: name the layers to take"
            )
        _require(shapes, len(example) if isinstance(example, Tensor) else None)
        self._dims = {
            name: _feature_dim(modules[name], len(shape)) if channel_dim is None else channel_dim
            for name, (shape,) in shapes.items()
        }
        sizes = {name: shape[self._dims[name]] for name, (shape,) in shapes.items()}
        self.network = network
        self.layers = tuple(sizes) if layers is not None else _thinned(sizes, max_features)
        self.out_features = sum(sizes[name] for name in self.layers)
        layout = "\n".join(f"{name} {self._dims[name]}" for name in self.layers)
        self.register_buffer("layout", torch.tensor(list(layout.encode()), dtype=torch.uint8))

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Computes the features.

        Args:
            *inputs: What the network takes.
            **named: The same, by names.

        Returns:
            Of shape ``(samples, out_features)``.

        Raises:
            ValueError: If a layer does not run exactly once, or does not give samples first.
        """
        found = _run(self.network, self.layers, inputs, named, self._averaged)
        first = next((given for given in inputs if isinstance(given, Tensor)), None)
        shapes = {name: [part.shape for part in parts] for name, parts in found.items()}
        _require(shapes, None if first is None else len(first))
        # Layer normalisation would make features depend on each other, but for rounding.
        scaled = [functional.rms_norm(mean, mean.shape[1:]) for (mean,) in found.values()]
        return torch.cat(scaled, dim=1)

    def _averaged(self, name: str, output: Tensor) -> Tensor:
        """Averages over all dimensions but those of samples and features."""
        by_features = output.movedim(self._dims[name], 1)
        return by_features.flatten(2).mean(2) if by_features.ndim > 2 else by_features.clone()


def find_blocks(network: nn.Module) -> list[str]:
    """Names the blocks of a network, or its stages: the kind of module with most of its weights.

    PyTorch's own kinds, as convolutions, are none, nor is what is made from them, but for
    `torch.nn.TransformerEncoderLayer`. There must be two of a kind at least, and none in another.

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
        if not name or not _may_be_a_block(module):
            continue
        if weights := sum(parameter.numel() for parameter in module.parameters()):
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


def _run(
    network: nn.Module,
    layers: Sequence[str],
    inputs: tuple[Any, ...],
    named: Mapping[str, Any],
    read: Callable[[str, Tensor], _Read],
) -> dict[str, list[_Read]]:
    """Runs a network, and reads what each layer gives, before anything is done to it."""
    found: dict[str, list[_Read]] = {name: [] for name in layers}

    def keep(name: str, module: nn.Module, given: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(first, Tensor) or first.ndim < 2:
            raise ValueError(f"{name} gives no tensor of features, and cannot be read")
        found[name].append(read(name, first))

    hooks = [
        network.get_submodule(name).register_forward_hook(partial(keep, name)) for name in layers
    ]
    try:
        network(*inputs, **named)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def _shapes(network: nn.Module, layers: Sequence[str], example: Any) -> dict[str, list[torch.Size]]:
    """Tells the shapes of what each layer gives, and leaves the network as it is."""
    probe = copy.deepcopy(network).eval()
    with kept_random_states():
        return _run(probe, layers, (example,), {}, lambda name, output: output.shape)


def _require(shapes: Mapping[str, Sequence[torch.Size]], samples: int | None) -> None:
    """Refuses layers that did not run once, or do not give samples first."""
    if wrong := [f"{name} {len(found)}" for name, found in shapes.items() if len(found) != 1]:
        raise ValueError(
            "layers must run once in a forward pass (and a network must not be compiled by "
            f"itself), and ran otherwise: {', '.join(wrong)} times"
        )
    unlike = [f"{name} {tuple(shape)}" for name, (shape,) in shapes.items() if shape[0] != samples]
    if samples is not None and unlike:
        raise ValueError(
            f"layers must give samples first, {samples} of them, and gave shapes otherwise: "
            + ", ".join(unlike)
        )


def _feature_dim(layer: nn.Module, ndim: int) -> int:
    """Finds the dimension of the features in what a layer gives.

    Args:
        layer: The layer.
        ndim: Number of dimensions of what it gives.
    """
    modules = [*layer.modules()]
    # The kernel of a convolution has as many dimensions as its output, whose features are second.
    if ndim in {module.weight.ndim for module in modules if isinstance(module, _CONVOLUTIONS)}:
        return 1
    linear = any(isinstance(module, nn.Linear) for module in modules)
    return 1 if ndim > 3 and not linear else ndim - 1


def _thinned(sizes: Mapping[str, int], most: int) -> tuple[str, ...]:
    """Chooses layers at even distances, with no more features than allowed.

    Args:
        sizes: Number of features of each layer, by name.
        most: How many are allowed.

    Returns:
        Names, with the last of those that have no more than half of them. If there is no such
        layer, the last of all.
    """
    names = [name for name, size in sizes.items() if 2 * size <= most] or [[*sizes][-1]]
    for step in range(1, len(names)):
        chosen = names[::-1][::step][::-1]
        if sum(sizes[name] for name in chosen) <= most:
            return tuple(chosen)
    return (names[-1],)
