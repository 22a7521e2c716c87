"""Losses for the local training of clients whose classes differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

# What a class counts for that a client does not hold: next to nothing, but its logit stays finite.
_ABSENT = 1e-3


class PriorCrossEntropy(nn.Module):
    """Cross-entropy in which the client's class frequencies explain what they can.

    A client that holds one class in a hundred samples learns from plain cross-entropy that the
    class is rare, which is true of this client alone and lost when models are merged. Here the
    logarithm of each class's frequency is added to the logits in the loss, and nowhere else. So the
    network learns what tells classes apart, and its logits are those of balanced classes (Menon et
    al., 2021, "Long-tail learning via logit adjustment"; Zhang et al., 2022, "Federated Learning
    with Label Distribution Skew via Logits Calibration").

    Attributes:
        log_prior: Logarithm of each class's frequency, of shape ``(classes,)``. It is no part of
            the state dict.

    Example:
        >>> loss = PriorCrossEntropy([30, 10])
        >>> logits = torch.zeros(1, 2)
        >>> round(float(loss(logits, torch.tensor([0]))), 4)  # -log(3 / 4)
        0.2877
    """

    log_prior: Tensor

    def __init__(self, class_counts: Sequence[int] | Tensor, ignore_index: int = -100) -> None:
        """Counts what the client holds.

        Args:
            class_counts: Number of the client's samples of each class, of shape ``(classes,)``.
            ignore_index: Label of positions that do not count.

        Raises:
            ValueError: If a count is negative or not finite, or all are zero.
        """
        super().__init__()
        counts = torch.as_tensor(class_counts, dtype=torch.float64)
        if counts.ndim != 1 or not (counts.isfinite().all() and (counts >= 0).all()):
            raise ValueError(f"class_counts must be numbers of samples, got {class_counts}")
        if not counts.any():
            raise ValueError("class_counts are all zero: the client holds no samples")
        prior = counts.clamp_min(_ABSENT)
        self.register_buffer("log_prior", (prior / prior.sum()).log().float(), persistent=False)
        self._ignored = ignore_index

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Computes the mean loss of a batch.

        Args:
            logits: Of shape ``(samples, classes, *positions)``.
            labels: Class indices of shape ``(samples, *positions)``.

        Returns:
            The mean over the observed positions, a scalar.

        Raises:
            ValueError: If there are not as many classes as counts.
        """
        classes = len(self.log_prior)
        if logits.ndim < 2 or logits.shape[1] != classes:
            raise ValueError(
                f"logits must have {classes} classes second, as class_counts, got "
                f"{tuple(logits.shape)}"
            )
        # In float32 at least, which autocast would not see to.
        prior = self.log_prior.view(-1, *[1] * (logits.ndim - 2))
        return functional.cross_entropy(logits + prior, labels, ignore_index=self._ignored)
