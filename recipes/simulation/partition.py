"""The Dirichlet partition of the published experiments (arXiv 2403.12329).

Each client draws one distribution over the classes. Every class is then divided among the clients
in proportion to the probability that each of them drew for it, so a small ``alpha`` gives every
client a few dominant classes and clients of very different sizes.
"""

import numpy as np


def subset(size: int, most: int | None, seed: int) -> np.ndarray:
    """Choose samples at random.

    Args:
        size: Number of samples.
        most: Number of samples to choose at most; None takes all.
        seed: Seed of the choice.

    Returns:
        Their indices (int64), in ascending order.
    """
    if most is None or most >= size:
        return np.arange(size)
    return np.sort(np.random.default_rng(seed).choice(size, most, replace=False))


def reference_partition(
    labels: np.ndarray, clients: int, alpha: float, seed: int
) -> list[np.ndarray]:
    """Divide the samples among the clients as the published code does.

    The draws come from NumPy's legacy generator in a fixed order: the clients' Dirichlet draws, one
    shuffle per class, one shuffle per client. The client sizes of the published experiments
    (``clients=5, seed=3``) depend on that order.

    Args:
        labels: Class of each sample, integers of shape (samples,).
        clients: Number of clients, at least 1.
        alpha: Dirichlet concentration, positive; the smaller, the more the clients differ.
        seed: Seed of this partition alone; NumPy's global generator is neither read nor changed.

    Returns:
        The sample indices (int64) of each client. Together they hold every index exactly once.

    Raises:
        ValueError: If an argument is out of range, or if some client is left without samples.
    """
    _check_arguments(labels, clients, alpha)
    generator = np.random.RandomState(seed)
    classes = int(labels.max()) + 1
    draws = generator.dirichlet(np.full(classes, alpha), size=clients)  # (clients, classes)
    totals = draws.sum(axis=0)
    if not (np.isfinite(totals).all() and (totals > 0).all()):
        raise ValueError(
            f"alpha={alpha} is so small that no client drew a share of some class; "
            "use a larger alpha"
        )
    shares = draws / totals

    pieces: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label in range(classes):
        indices = np.flatnonzero(labels == label)
        generator.shuffle(indices)
        cuts = np.floor(np.cumsum(shares[:, label]) * len(indices)).astype(np.int64)
        for client, piece in zip(pieces, np.split(indices, cuts[:-1]), strict=True):
            client.append(piece)

    parts = [np.concatenate(client) for client in pieces]
    for part in parts:
        generator.shuffle(part)

    empty = [client for client, part in enumerate(parts) if len(part) == 0]
    if empty:
        raise ValueError(
            f"clients {empty} of {clients} are left without samples (alpha={alpha}, seed={seed}); "
            "use a larger alpha, fewer clients or another partition seed"
        )
    return parts


def class_histogram(labels: np.ndarray, parts: list[np.ndarray], classes: int) -> np.ndarray:
    """Count the samples of each class that each client holds.

    Args:
        labels: Class of each sample, integers of shape (samples,) in [0, classes).
        parts: Sample indices of each client.
        classes: Number of classes.

    Returns:
        Counts (int64) of shape (clients, classes).
    """
    return np.stack([np.bincount(labels[part], minlength=classes) for part in parts])


def leaves_one_alone(samples: int, batch_size: int) -> bool:
    """Tell whether the last batch is of one sample, which has no statistics to normalise by.

    Args:
        samples: Number of samples.
        batch_size: Samples in a batch.

    Returns:
        True if there are others besides it, so that it may be left out.
    """
    return samples % batch_size == 1 and samples > batch_size


def _check_arguments(labels: np.ndarray, clients: int, alpha: float) -> None:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be integers of shape (samples,), not {labels.dtype} of {labels.shape}"
        )
    if len(labels) == 0 or labels.min() < 0:
        raise ValueError("labels must hold at least one sample, and no negative class")
    if clients < 1:
        raise ValueError(f"clients must be at least 1, not {clients}")
    if not 0 < alpha < np.inf:
        raise ValueError(f"alpha must be positive and finite, not {alpha}")
