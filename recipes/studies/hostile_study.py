"""Studies what hostile clients do to a merge, and what robust averages make of the same updates.

Ten clients train on scikit-learn's digits; one or three of them are hostile. `fedfisher` merges the
updates with no bound on a client's influence, with a wide one and with the default. Averages of
Byzantine-robust learning take the same weights (see `peers.robust_averages`).
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from jsonargparse import ArgumentParser
from peers.robust_averages import coordinate_median, krum, mean, trimmed_mean
from simulation.data import TensorImages
from simulation.federations import Federation
from simulation.partition import reference_partition
from simulation.study import Table, default_update
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from lightning_fedfisher import ClientUpdate, merge_updates
from lightning_fedfisher.layers import Layer
from lightning_fedfisher.merge.influence_cap import median

CLIENTS, TRAINED_ON = 10, 1437
BOUNDS = {"fedfisher, no bound": math.inf, "fedfisher, 10": 10.0, "fedfisher, 2": 2.0}
AVERAGES = {f.__name__.replace("_", " "): f for f in (mean, coordinate_median, trimmed_mean, krum)}
FEDERATIONS = [Federation("digits", model, 1.0, 0, 0) for model in ("mlp", "cnn", "batchnorm")]
NOBODY, FLIPPED, AIMED = "none", "flipped labels", "aimed"
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Row(Federation):
    """A result: accuracy in percent, the worst of the attack's variants."""

    hostile: int
    attack: str
    merge: str
    accuracy: float


def build_network(name: str) -> nn.Sequential:
    """Builds a small network for 8x8 digits.

    Args:
        name: ``mlp``, ``cnn`` or ``batchnorm``.
    """
    if name == "mlp":
        hidden = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(32, 10))
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d if name == "batchnorm" else nn.Identity
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), norm(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), norm(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )


def digits() -> tuple[TensorImages, TensorImages]:
    """Loads the digits as they are, 1x8x8: for training, and for the test."""
    found = load_digits()
    images = torch.from_numpy(found.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    order = np.random.default_rng(0).permutation(len(images))
    whole = TensorImages(images, torch.from_numpy(found.target).long(), (0.3,), (0.38,))
    return whole.subset(order[:TRAINED_ON]), whole.subset(order[TRAINED_ON:])


def train(network: nn.Module, samples: TensorImages, seed: int, epochs: int = 20) -> nn.Module:
    """Trains a copy of a network with SGD.

    Args:
        network: what to start from.
        samples: the client's own.
        seed: of the order of the samples.
        epochs: passes over them.
    """
    trained, order = copy.deepcopy(network).train(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(trained.parameters(), 0.1, momentum=0.9)
    for _ in range(epochs):
        for indices in torch.randperm(len(samples), generator=order).split(32):
            if len(indices) > 1:  # one sample has no variance to normalise by
                x, y = samples.__getitems__(indices.tolist())
                optimizer.zero_grad()
                functional.cross_entropy(trained(x), y).backward()
                optimizer.step()
    return trained


@dataclass(frozen=True)
class Truth:
    """What an attacker is told: everything but the test set.

    Attributes:
        initial: the network that all clients start from.
        honest: the honest clients' updates.
        merged: what they merge to without anybody else.
        samples: all clients' training samples.
        flipped: updates of the hostile clients, trained on labels from the other end.
        hostile: how many clients are hostile.
    """

    initial: nn.Module
    honest: Sequence[ClientUpdate]
    merged: State
    samples: TensorImages
    flipped: Sequence[ClientUpdate]
    hostile: int

    def median(self) -> dict[str, Tensor]:
        """The median of the honest weights."""
        names = self.honest[0].parameters
        return {n: median([update.parameters[n] for update in self.honest]) for n in names}

    def mean(self, power: int = 1) -> dict[str, Tensor]:
        """The mean of the honest weights, or their standard deviation with a power of 2."""
        stacks = {
            n: torch.stack([u.parameters[n] for u in self.honest])
            for n in self.honest[0].parameters
        }
        return {n: t.mean(0) if power == 1 else t.std(0) for n, t in stacks.items()}


Factors = dict[str, dict[str, Tensor]]
"""The tensors of each layer's curvature."""


def forge(
    like: ClientUpdate, weights: State, factors: Factors, more: float, index: int
) -> ClientUpdate:
    """Forges a valid update.

    Args:
        like: an honest update, of which all that is not said here is taken.
        weights: the parameters by name.
        factors: the tensors of each layer's curvature.
        more: what curvature is multiplied by.
        index: makes several forgeries differ, by so many samples.

    Returns:
        The forged update.
    """
    tensors = {name: like._tensors[name] for name in like._tensors}
    tensors |= {f"parameters/{name}": tensor.clone() for name, tensor in weights.items()}
    for layer, parts in factors.items():
        for place, (name, tensor) in enumerate(parts.items()):
            tensors[f"curvature/{layer}/{name}"] = tensor * (more if place == 0 else 1.0)
    samples = like.num_samples + 1 + index
    header = dataclasses.replace(like.header, quantized={}, num_samples=samples)
    return ClientUpdate(header, tensors, f"hostile client {index}")


def honest_factors(updates: Sequence[ClientUpdate]) -> Factors:
    """Averages the tensors of the curvature of each layer."""
    blocks = [update.blocks for update in updates]
    return {
        layer: {
            name: torch.stack([each[layer].tensors()[name] for each in blocks]).mean(0)
            for name in blocks[0][layer].tensors()
        }
        for layer in blocks[0]
    }


def flat(factors: Factors) -> Factors:
    """Spreads curvature over all directions alike."""
    return {
        layer: {
            name: t.diagonal().mean() * torch.eye(len(t))
            if t.shape == t.mT.shape
            else t.mean().expand_as(t)
            for name, t in parts.items()
        }
        for layer, parts in factors.items()
    }


def concentrated(factors: Factors, layers: Sequence[Layer], offsets: State) -> Factors:
    """Puts all curvature of linear layers where the offsets of the weights are."""
    found = dict(factors)
    for layer in layers:
        parts, offset = factors[layer.name], layer.join(offsets)
        if {"row_factor", "column_factor"} <= parts.keys():
            grams = {"row_factor": offset @ offset.mT, "column_factor": offset.mT @ offset}
            found[layer.name] = {
                name: gram * (parts[name].trace() / gram.trace()) for name, gram in grams.items()
            }
    return found


def aim(truth: Truth, radius: float, steps: int = 60) -> dict[str, Tensor]:
    """Looks for the change of the merged weights that harms most, by projected gradient ascent.

    Args:
        truth: what the attacker knows.
        radius: of the change of each tensor, as a multiple of the median client's distance.
        steps: of the ascent.

    Returns:
        A change for each parameter, scaled to the median client's distance.
    """
    middle, honest = truth.median(), truth.honest
    radii = {
        n: radius * torch.stack([(u.parameters[n] - m).norm() for u in honest]).median()
        for n, m in middle.items()
    }
    dice = torch.Generator().manual_seed(0)
    change = {n: 1e-3 * r * torch.randn(middle[n].shape, generator=dice) for n, r in radii.items()}
    network = copy.deepcopy(truth.initial).train()
    x, y = truth.samples.__getitems__(range(len(truth.samples)))
    for _ in range(steps):
        free = {n: t.requires_grad_() for n, t in change.items()}
        weights = {n: truth.merged[n] + t for n, t in free.items()}
        loss = functional.cross_entropy(torch.func.functional_call(network, weights, (x,)), y)
        slopes = torch.autograd.grad(loss, list(free.values()))
        change = {}
        for (n, t), slope in zip(free.items(), slopes, strict=True):
            moved = t.detach() + 0.1 * radii[n] * slope / slope.norm().clamp_min(1e-12)
            change[n] = moved * (radii[n] / moved.norm()).clamp_max(1)
    return {n: t / radius for n, t in change.items()}


def variants(attack: str, truth: Truth) -> Iterator[list[ClientUpdate]]:
    """Makes what the hostile clients send.

    Args:
        attack: ``mirror``: on the other side of the median, twice as far. ``alie``: a little off
            the mean (Baruch et al., 2019). ``ipm``: against the mean change (Xie et al., 2020).
            ``mimic``: all as one honest client (Karimireddy et al., 2022). `FLIPPED`: trained on
            labels from the other end. `AIMED`: told everything, and looking for the worst.
        truth: what the attacker knows.

    Yields:
        The updates of all hostile clients, for each variant of the attack.
    """
    like, middle = truth.honest[0], truth.median()
    typical = honest_factors(truth.honest)

    def all_send(weights: State, factors: Factors, more: float) -> list[ClientUpdate]:
        return [forge(like, weights, factors, more, index) for index in range(truth.hostile)]

    match attack:
        case "mirror":
            own = {layer: dict(block.tensors()) for layer, block in like.blocks.items()}
            weights = {n: m - 2 * (like.parameters[n] - m) for n, m in middle.items()}
            yield all_send(weights, own, 4.0)
        case "alie":
            average, spread = truth.mean(), truth.mean(power=2)
            honest = len(truth.honest)
            supporters = (honest + truth.hostile) // 2 + 1 - truth.hostile
            z = NormalDist().inv_cdf((honest - supporters) / honest)
            for far in (z, -z):
                yield all_send({n: m + far * spread[n] for n, m in average.items()}, typical, 1.0)
        case "ipm":
            first, average = dict(truth.initial.named_parameters()), truth.mean()
            weights = {n: 2 * first[n].detach() - m for n, m in average.items()}
            yield all_send(weights, typical, 1.0)
        case "mimic":
            own = {layer: dict(block.tensors()) for layer, block in like.blocks.items()}
            yield all_send(like.parameters, own, 1.0)
        case _ if attack == FLIPPED:
            yield list(truth.flipped)
        case _ if attack == AIMED:
            for radius in (0.25, 0.5):
                change = aim(truth, radius)
                forms = typical, flat(typical), concentrated(typical, like.layers, change)
                for far in (1.0, 2.0):
                    weights = {n: m + far * change[n] for n, m in middle.items()}
                    for factors in forms:
                        yield all_send(weights, factors, 4.0)


ATTACKS = ("mirror", "alie", "ipm", "mimic", FLIPPED, AIMED)


def merged_by(name: str, updates: Sequence[ClientUpdate], hostile: int) -> State:
    """Merges updates.

    Args:
        name: of `BOUNDS` or `AVERAGES`.
        updates: of all clients.
        hostile: how many of them are hostile, which robust averages have to be told.

    Returns:
        The merged parameters and buffers.
    """
    if name in BOUNDS:
        return merge_updates(updates, max_influence=BOUNDS[name]).state_dict
    states = [{**update.parameters, **update.buffers} for update in updates]
    return {
        n: AVERAGES[name](torch.stack([s[n].flatten() for s in states]), hostile).view(first.shape)
        if first.is_floating_point() and name != "krum"
        else first
        for n, first in _chosen(name, states, hostile).items()
    }


def _chosen(name: str, states: Sequence[State], hostile: int) -> State:
    """The state of the client that Krum chooses, which looks at all weights; else of the first."""
    if name != "krum":
        return states[0]
    floats = [torch.cat([t.flatten() for t in s.values() if t.is_floating_point()]) for s in states]
    vectors = torch.stack(floats)
    found = krum(vectors, hostile)
    return states[[bool(torch.equal(row, found)) for row in vectors].index(True)]


def run_federation(federation: Federation, settings: Sequence[tuple[int, str]]) -> Iterator[Row]:
    """Trains one federation, and merges it under each attack by each merge.

    Args:
        federation: what to train.
        settings: numbers of hostile clients, and attacks.

    Yields:
        A result for each setting and merge.
    """
    samples, test = digits()
    parts = reference_partition(
        samples.labels.numpy(), CLIENTS, federation.alpha, federation.partition_seed
    )
    torch.manual_seed(federation.seed)
    initial, owned = build_network(federation.model), [samples.subset(part) for part in parts]
    updates = [_update(train(initial, own, k), own, f"client {k}") for k, own in enumerate(owned)]
    x, y = test.__getitems__(range(len(test)))

    def accuracy(state: State) -> float:
        network = copy.deepcopy(initial).eval()
        network.load_state_dict(dict(state))
        with torch.no_grad():
            return 100 * float((network(x).argmax(1) == y).float().mean())

    for hostile, attack in settings:
        honest = updates[: CLIENTS - hostile]
        flipped = []
        for k, own in enumerate(owned[CLIENTS - hostile :] if attack == FLIPPED else []):
            wrong = dataclasses.replace(own, labels=9 - own.labels)
            flipped.append(_update(train(initial, wrong, 100 + k), wrong, f"hostile client {k}"))
        merged = merge_updates(honest).state_dict
        truth = Truth(initial, honest, merged, samples, flipped, hostile)
        sent = [[]] if attack == NOBODY else list(variants(attack, truth))
        for name in (*BOUNDS, *AVERAGES):
            found = [accuracy(merged_by(name, [*honest, *own], hostile)) for own in sent]
            yield Row(*dataclasses.astuple(federation), hostile, attack, name, min(found))


def _update(network: nn.Module, samples: TensorImages, source: str) -> ClientUpdate:
    update = default_update((network, samples))[0]
    update.source = source
    return update


def make_parser() -> ArgumentParser:
    """Describes the command line."""
    parser = ArgumentParser(prog="hostile_study.py", description=__doc__)
    default = Path("runs") / "hostile_study"
    parser.add_argument("--output-dir", type=Path, default=default, help="folder for results")
    return parser


def run(output_dir: Path) -> None:
    """Fills the table; what it has is not made again.

    Args:
        output_dir: folder of the table.
    """
    settings = [(hostile, attack) for hostile in (1, 3) for attack in (NOBODY, *ATTACKS)]
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / "hostile_study.csv"
    table = Table(path, Row)
    for federation in FEDERATIONS:
        missing = [s for s in settings if not table.has(federation, (str(s[0]), s[1]))]
        for row in run_federation(federation, missing) if missing else ():
            table.append(row)
    print(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study from the command line.

    Args:
        arguments: of the command line; None reads `sys.argv`.
    """
    warnings.filterwarnings("ignore", message="(?s).*(median client|unlike outputs|keep less than)")
    run(make_parser().parse_args(arguments).output_dir)


if __name__ == "__main__":
    main()
