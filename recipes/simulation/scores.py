"""How good the predictions of a model, or of several together, are on test data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)

from lightning_fedfisher.results.record import ModelScore


def ensemble(predictions: Sequence[Tensor]) -> Tensor:
    """Averages the probabilities of several models, as inference with all of them does.

    Args:
        predictions: log-probabilities ``(n, classes)`` of each model.

    Returns:
        Log-probabilities ``(n, classes)`` of the ensemble.
    """
    return torch.stack(list(predictions)).logsumexp(dim=0) - math.log(len(predictions))


def assess(log_probabilities: Tensor, labels: Tensor) -> ModelScore:
    """Scores a model on test data in every way that is reported.

    Args:
        log_probabilities: of shape ``(n, classes)``.
        labels: of shape ``(n,)``.

    Returns:
        Accuracy and calibration error in percent, negative log-likelihood in nats, and confusion.
    """
    classes = log_probabilities.shape[1]
    off = multiclass_calibration_error(log_probabilities.exp(), labels, classes, n_bins=15)
    confusion = multiclass_confusion_matrix(log_probabilities, labels, classes)
    return ModelScore(*score(log_probabilities, labels), 100 * float(off), confusion.tolist())


def score(log_probabilities: Tensor, labels: Tensor) -> tuple[float, float]:
    """Scores a model on test data by accuracy and likelihood.

    Args:
        log_probabilities: of shape ``(n, classes)``.
        labels: of shape ``(n,)``.

    Returns:
        Accuracy in percent, and the mean negative log-likelihood in nats.
    """
    classes = log_probabilities.shape[1]
    accuracy = multiclass_accuracy(log_probabilities, labels, num_classes=classes, average="micro")
    return 100 * float(accuracy), float(functional.nll_loss(log_probabilities, labels))
