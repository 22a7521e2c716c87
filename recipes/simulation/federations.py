"""The federations that the studies and benchmarks are made on.

Those called ``development`` are the ones on which choices were made; ``held-out`` ones were merged
once all choices were made.
"""

from __future__ import annotations

from dataclasses import dataclass

from simulation.models import NORMALISED


@dataclass(frozen=True)
class Federation:
    """One simulated federation of five clients: a data set, a network, a split and a training.

    Attributes:
        dataset: name of the data set, as `simulation.data.load_images` takes it.
        model: name of the network, one of `simulation.models.MODELS`.
        alpha: Dirichlet concentration of the split; the smaller, the more the clients differ.
        partition_seed: seed of the split.
        seed: seed of the initial weights and of training.
    """

    dataset: str
    model: str
    alpha: float
    partition_seed: int
    seed: int

    @property
    def name(self) -> str:
        """Name of the folder that holds its trained clients."""
        return f"{self.dataset}-{self.model}-a{self.alpha:g}-p{self.partition_seed}-s{self.seed}"


CURVATURE_FEDERATIONS = {
    "development": [
        Federation("fashionmnist", "lenet", 0.1, 3, 0),
        Federation("fashionmnist", "lenet", 0.1, 4, 0),
        Federation("fashionmnist", "lenet", 0.1, 5, 0),
        Federation("fashionmnist", "lenet", 0.3, 3, 0),
        Federation("fashionmnist", "lenet", 0.05, 4, 0),
        Federation("fashionmnist", "lenet", 0.07, 11, 7),
        Federation("imagefolder", "cnn", 0.1, 3, 0),
    ],
    "held-out": [
        Federation("fashionmnist", "lenet", 0.1, 30, 1),
        Federation("fashionmnist", "lenet", 0.2, 31, 1),
        Federation("fashionmnist", "lenet", 0.05, 32, 1),
        Federation("imagefolder", "cnn", 0.3, 30, 1),
    ],
}
"""The federations of the curvature study, whose clients the benchmarks use as well."""

_ALPHAS = (0.1, 0.2, 0.05, 0.3, 0.05, 0.1, 0.2, 0.3)

MERGE_FEDERATIONS = {
    "development": [
        *(
            Federation("fashionmnist", "lenet", alpha, split, 0)
            for alpha in (0.05, 0.1, 0.2, 0.3)
            for split in range(3, 8)
        ),
        Federation("imagefolder", "cnn", 0.1, 3, 0),
    ],
    "seeds": [
        Federation("fashionmnist", "lenet", alpha, 3, seed)
        for alpha in (0.05, 0.1, 0.2)
        for seed in range(3)
    ],
    "earlier": [
        *(Federation("fashionmnist", "lenet", a, p, 1) for p, a in enumerate(_ALPHAS, start=30)),
        Federation("imagefolder", "cnn", 0.3, 30, 1),
        Federation("imagefolder", "cnn", 0.05, 31, 1),
    ],
    "held-out": [
        *(Federation("fashionmnist", "lenet", a, p, 1) for p, a in enumerate(_ALPHAS, start=38)),
        Federation("imagefolder", "cnn", 0.2, 32, 1),
    ],
    "normalised": [
        Federation("digits", model, alpha, split, 0)
        for model in NORMALISED
        for alpha in (0.1, 0.3)
        for split in range(3, 8)
    ],
}
"""The federations of the merge study.

``seeds`` are training seeds of three splits of ``development``; ``earlier`` were held out from an
earlier form of the default method; ``normalised`` are ten splits of networks with normalisation.
"""

POSITIONS_FEDERATIONS = {"development": MERGE_FEDERATIONS["development"][:-1]}
"""The federations of the positions study: those of the merge study, without the CNN."""


def benchmark_federation(model: str) -> Federation:
    """Chooses the federation whose trained clients the benchmarks work on.

    Args:
        model: name of its network.

    Returns:
        The first development federation of the curvature study with that network.

    Raises:
        ValueError: if there is none with that network.
    """
    for federation in CURVATURE_FEDERATIONS["development"]:
        if federation.model == model:
            return federation
    known = sorted({federation.model for federation in CURVATURE_FEDERATIONS["development"]})
    raise ValueError(f"--model {model} has no trained clients: choose one of {', '.join(known)}")
