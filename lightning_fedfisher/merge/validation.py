"""Accuracy and negative log-likelihood of the merged model while it is solved for."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DistributedSampler
from torchmetrics import MeanMetric


class Validation:
    """One pass of a copy of the model over the validation samples."""

    def __init__(
        self, model: nn.Module, state: Mapping[str, Tensor], loaders: Any, device: torch.device
    ) -> None:
        """Loads a copy of the model, in its own dtypes and in evaluation mode.

        Args:
            model: stays as it is.
            state: parameters and buffers to be loaded; what is missing keeps the model's values.
            loaders: the trainer's validation loaders.
            device: where to run.

        Raises:
            ValueError: if there are several loaders, or one deals its samples to processes.
        """
        every = loaders if isinstance(loaders, list | tuple) else [loaders]
        if len(every) != 1 or isinstance(every[0], dict):
            raise ValueError("pass one validation loader, of batches (x, y)")
        if isinstance(getattr(every[0], "sampler", None), DistributedSampler):
            raise ValueError(
                "every process needs all validation samples, each once: use "
                "Trainer(use_distributed_sampler=False)"
            )
        self._accuracy, self._nll = MeanMetric().to(device), MeanMetric().to(device)
        self._replica = copy.deepcopy(model).to(device).eval()
        self._replica.load_state_dict(state, strict=False)

    def update(self, batch: Any) -> None:
        """Runs a batch.

        Args:
            batch: inputs and class labels.

        Raises:
            ValueError: if it is anything else.
        """
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            raise ValueError(
                f"a validation batch must be a pair (x, y), got {type(batch).__name__}"
            )
        x, y = batch
        logits = self._replica(x)
        self._accuracy.update((logits.argmax(1) == y).float() * 100)
        self._nll.update(functional.cross_entropy(logits, y, reduction="none"))

    def compute(self) -> tuple[dict[str, float], int]:
        """What came out.

        Returns:
            ``val_accuracy`` in percent and ``val_nll`` in nats, and the number of samples.
        """
        samples = int(self._nll.weight)
        scores = {"val_accuracy": self._accuracy, "val_nll": self._nll}
        return {name: float(metric.compute()) for name, metric in scores.items()}, samples
