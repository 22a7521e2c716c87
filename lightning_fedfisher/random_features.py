"""Features for a head in closed form that a linear layer on the network's own cannot see."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

# Weights are multiples of its inverse.
_LARGEST = 127


class RandomFeatures(nn.Module):
    """A fixed random layer between a pre-trained network and its head.

    A linear head in closed form sees no more than linear functions of what the network makes of a
    sample. Behind this layer it sees random nonlinear ones as well, and comes close to what
    training would give, while its fit stays exact: still one forward pass, and still the same for
    every split. The outputs are the inputs, brought to one root mean square, and beside them
    ``relu(weight @ inputs)`` of those, with random weights (McDonnell et al., 2023, "RanPAC: Random
    Projections and Pre-trained Models for Continual Learning"; for federated heads, Fanì et al.,
    2024, "Accelerating Heterogeneous Federated Learning with Closed-form Classifiers"). Neither
    depends on the scale of the inputs. More features see more, but the update of the head grows
    with the square of `out_features`.

    The weights are frozen: they are not sent, and a server refuses clients whose weights differ. So
    all who take part use one seed.

    Attributes:
        weight: Uniform between -1 and 1, of shape ``(random_features, in_features)``.
        in_features: Number of inputs.
        random_features: Number of nonlinear outputs.
        out_features: Number of outputs, ``in_features + random_features``.

    Example:
        >>> features = RandomFeatures(384)
        >>> head = nn.Sequential(features, nn.Linear(features.out_features, 77))
        >>> head(torch.rand(2, 384)).shape
        torch.Size([2, 77])
    """

    def __init__(self, in_features: int, random_features: int = 1000, seed: int = 0) -> None:
        """Draws the weights; no other random number depends on it.

        Args:
            in_features: Number of features of the network.
            random_features: Number of nonlinear ones to add.
            seed: Of the weights.

        Raises:
            ValueError: If there are no features.
        """
        super().__init__()
        if in_features < 1 or random_features < 1:
            raise ValueError(
                "in_features and random_features must be at least 1, got "
                f"{in_features} and {random_features}"
            )
        self.in_features, self.random_features = in_features, random_features
        self.out_features = in_features + random_features
        # Of whole numbers, which are the same on every machine to the bit.
        generator = torch.Generator().manual_seed(seed)
        shape = (random_features, in_features)
        drawn = torch.randint(
            -_LARGEST, _LARGEST + 1, shape, generator=generator, device=generator.device
        )
        weight = (drawn / float(_LARGEST)).to(torch.get_default_device())
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Computes the features.

        Args:
            inputs: Of shape ``(..., in_features)``.

        Returns:
            Of shape ``(..., out_features)``.
        """
        # Layer normalisation would make features depend on each other, but for rounding.
        own = functional.rms_norm(inputs, (self.in_features,))
        drawn = functional.linear(own, self.weight) * (3 / self.random_features) ** 0.5
        return torch.cat([own, drawn.relu()], dim=-1)

    def extra_repr(self) -> str:
        """Tells the sizes."""
        return f"in_features={self.in_features}, random_features={self.random_features}"
