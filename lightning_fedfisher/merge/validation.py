"""Scores of the merged model on labelled samples, while it is solved for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from lightning_fedfisher.likelihoods.base import Likelihood
from lightning_fedfisher.merge.loaded_model import loaded_copy, to_device


class Validation:
    """One pass of a copy of the model over the validation samples."""

    def __init__(
        self,
        model: nn.Module,
        state: Mapping[str, Tensor],
        likelihood: type[Likelihood],
        device: torch.device,
    ) -> None:
        """Loads a copy of the model, in its own dtypes and in evaluation mode.

        Args:
            model: The model; it is not changed.
            state: Parameters and buffers to load by name; what is missing keeps the model's values.
            likelihood: Likelihood of the labels given the model's outputs.
            device: Where to run.
        """
        self._likelihood = likelihood
        # Sums over samples, on the CPU.
        self._samples, self._nll = 0, 0.0
        self._judged, self._correct = 0, 0.0
        self._model = loaded_copy(model, state, device)

    def update(self, batch: Any) -> None:
        """Runs a batch.

        Args:
            batch: A pair of inputs and labels.

        Raises:
            ValueError: If it is anything else, or the labels cannot belong to the outputs.
        """
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            raise ValueError(
                f"a validation batch must be a pair (x, y), got {type(batch).__name__}"
            )
        x, y = batch
        logits = self._model(x)
        self._samples += len(logits)
        self._nll += float(self._likelihood.nll(logits, y).double().sum())
        accuracy = self._likelihood.accuracy(logits, y)
        if accuracy is not None:
            judged = accuracy[~accuracy.isnan()]  # a sample without a label is not judged
            self._judged += len(judged)
            self._correct += float(judged.double().sum())

    def compute(self) -> tuple[dict[str, float], int]:
        """Averages over all samples.

        Returns:
            ``val_nll`` in nats, and ``val_accuracy`` in percent where the likelihood has one; and
            the number of samples.

        Raises:
            ValueError: If there was no sample.
        """
        if not self._samples:
            raise ValueError("the validation loader gives no samples")
        scores = {"val_nll": self._nll / self._samples}
        if self._judged:
            scores = {"val_accuracy": 100 * self._correct / self._judged, **scores}
        return scores, self._samples


def validate(
    model: nn.Module,
    state: Mapping[str, Tensor],
    batches: Iterable[Any],
    likelihood: type[Likelihood],
    device: torch.device,
) -> tuple[dict[str, float], int]:
    """Scores a model with the merged weights.

    Args:
        model: The model; it is not changed.
        state: The merged parameters and buffers by name.
        batches: Pairs of inputs and labels.
        likelihood: Likelihood of the labels given the model's outputs.
        device: Where to run.

    Returns:
        As `Validation.compute`.
    """
    validation = Validation(model, state, likelihood, device)
    with torch.no_grad():
        for batch in batches:
            validation.update(to_device(batch, device))
    return validation.compute()


def goodness(scores: Mapping[str, float]) -> float:
    """A number that is the larger, the better a model is.

    Args:
        scores: What `validate` returned.

    Returns:
        ``val_accuracy``, or the negative ``val_nll`` where there is no accuracy; minus infinity
        for NaN.

    Example:
        >>> goodness({"val_nll": 0.5}), goodness({"val_nll": float("nan")})
        (-0.5, -inf)
    """
    score = scores.get("val_accuracy", -scores["val_nll"])
    return -math.inf if math.isnan(score) else score


def require_one_loader(loaders: Any) -> None:
    """Refuses validation loaders that do not give every process all samples once.

    Args:
        loaders: The validation loaders of a Trainer.

    Raises:
        ValueError: If there are several loaders, or one that gives each process a part.
    """
    every = loaders if isinstance(loaders, list | tuple) else [loaders]
    if len(every) != 1 or isinstance(every[0], dict):
        raise ValueError("pass one validation loader, of batches (x, y)")
    if isinstance(getattr(every[0], "sampler", None), DistributedSampler):
        raise ValueError(
            "every process needs all validation samples, each once: use "
            "Trainer(use_distributed_sampler=False)"
        )
