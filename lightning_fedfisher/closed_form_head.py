"""A client that trains nothing: the last layer of its model, fitted in one forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lightning_fedfisher.extraction.batches import Forward
from lightning_fedfisher.extraction.closed_form_head import extract_closed_form_head
from lightning_fedfisher.extraction.options import ExtractionOptions
from lightning_fedfisher.extraction.sampling import MaxSamples
from lightning_fedfisher.update.client_update import ClientUpdate


def fit_closed_form_head(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    head: str | None = None,
    likelihood: str = ExtractionOptions.likelihood,
    forward: Forward | None = None,
    batch_size: int | None = None,
    max_samples: MaxSamples = None,
    num_samples: int | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: bool = True,
) -> ClientUpdate:
    """Fits the last layer of a model to a client's labels, and makes the update that says so.

    Merged by the method ``closed_form_head``, the updates of any number of clients give the ridge
    regression of all their samples together, however these are split. All is computed and sent in
    float64, so that this holds to many digits, unless inputs vary by no more than a thousandth of
    their means. Outputs come close to 1 for the class and to 0 for the others: they tell the class,
    but are no logits of probabilities until they are scaled.

    Args:
        model: A model whose other layers are the same on all clients. It is left as it was.
        dataloader: Batches ``(x, y)`` of the client's own samples.
        head: Name of the layer to fit, if the outputs of several are the logits; None takes the
            last of them.
        likelihood: Name of the likelihood of the labels: ``"gaussian"`` for a linear regression.
        forward: Function that maps ``(module, batch)`` to logits, or to ``(logits, labels)``.
        batch_size: Number of samples in a batch; None keeps the loader's own.
        max_samples: Most samples to take; None takes all.
        num_samples: Number of samples the client holds, which is its weight in the merge; None
            counts those that were seen.
        metadata: Further text to send along, by names.
        progress: Whether to show a progress bar, after two seconds.

    Returns:
        The update of the head, in memory. Of all other parameters it holds the digests.

    Raises:
        UnsupportedModelError: If there is no such layer, or its outputs are not the logits.
        ValueError: If there are no samples, or a batch or the model's output is unusable.

    Example:
        >>> import torch
        >>> from lightning_fedfisher.merge import merge_updates
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> model, lines = nn.Linear(1, 1), dict(likelihood="gaussian")
        >>> one = fit_closed_form_head(model, [(x[:1], 2 * x[:1] + 1)], **lines)
        >>> other = fit_closed_form_head(model, [(x[1:], 2 * x[1:] + 1)], **lines)
        >>> merged = merge_updates([one, other], method="closed_form_head").state_dict
        >>> [round(tensor.item(), 4) for tensor in merged.values()]
        [2.0, 1.0]
    """
    options = ExtractionOptions(
        likelihood=likelihood, forward=forward, batch_size=batch_size, max_samples=max_samples
    )
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    found = extract_closed_form_head(model, dataloader, head, options, progress=progress)
    assert found.fitted is not None
    header = found.header(num_samples or found.population or found.num_samples, metadata)
    return ClientUpdate.from_model(found.fitted, header, found.blocks)
