"""Computes per-sample gradients by `torch.func`: the backend of parameters used in unknown ways.

The model is run on each sample alone. That works for every parameter: class tokens, position
embeddings, layer scales, weights of packed sequences, tied weights. All samples run at once by
`torch.func.vmap`, or one after the other if the model does something that has no batched form.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.overrides import BaseTorchFunctionMode

from lightning_fedfisher.errors import UnsupportedModelError
from lightning_fedfisher.extraction.batches import (
    MixedSamplesError,
    map_samples,
    require_same_logits,
)
from lightning_fedfisher.layers import Layer

# Entries of the per-sample gradients that are held at a time: 128 MB in float32.
_CHUNK_NUMEL = 2**25


class PerSampleGradients:
    """Per-sample gradients of some layers of a model.

    Example:
        >>> from lightning_fedfisher.layers import find_layers
        >>> model, batch = nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> gradients = PerSampleGradients(model, find_layers(model), lambda m, batch: m(batch))
        >>> (found,) = gradients(batch, model(batch).detach(), torch.ones(2, 1))
        >>> {name: tensor.tolist() for name, tensor in found.items()}
        {'weight': [[[1.0, 2.0, 1.0]], [[3.0, 4.0, 1.0]]]}
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        logits_of: Callable[[nn.Module, Any], Tensor],
    ) -> None:
        """Keeps the model; changes nothing.

        Args:
            model: The model in eval mode.
            layers: Layers whose gradients are wanted.
            logits_of: Maps the model and a batch to logits, samples first.
        """
        self._module = _LogitsModule(model, logits_of)
        self._layers = layers
        parameters = dict(model.named_parameters())
        self._parameters = {
            f"model.{name}": parameters[name].detach()
            for layer in layers
            for name in layer.parameter_names
        }
        # What a sample takes goes by the whole model, through which it is run, and not by the few
        # layers whose gradients are kept.
        self._numel = sum(p.numel() for p in parameters.values())
        self._batched = True

    def __call__(
        self, batch: Any, logits: Tensor, directions: Tensor
    ) -> Iterator[dict[str, Tensor]]:
        """Computes the gradient of ``<logits, direction>`` for each sample.

        Args:
            batch: A batch whose tensors run over samples first.
            logits: Logits of the whole batch, to compare with those of each sample alone.
            directions: A tensor of the shape of the logits, with one direction for each sample.

        Yields:
            Tensors of shape ``(samples, rows, columns)`` by layer name, chunk by chunk of samples.

        Raises:
            MixedSamplesError: If a sample's logits depend on the other samples of its batch.
        """
        samples = len(logits)
        tensors: list[Tensor] = []

        def collect(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor

        map_samples(batch, samples, collect)

        def scalar(
            parameters: Mapping[str, Tensor], own: Sequence[Tensor], direction: Tensor
        ) -> tuple[Tensor, Tensor]:
            remaining = iter(own)
            one = map_samples(batch, samples, lambda _: next(remaining).unsqueeze(0))
            result = functional_call(self._module, dict(parameters), (one,))
            if len(result) != 1:
                raise MixedSamplesError
            return (result[0] * direction).sum(), result[0].detach()

        step = max(1, _CHUNK_NUMEL // self._numel)
        for start in range(0, samples, step):
            here = slice(start, start + step)
            found, alone = self._run(scalar, [t[here] for t in tensors], directions[here])
            require_same_logits(alone, logits, here)
            yield {
                layer.name: torch.cat(
                    [
                        found[f"model.{name}"].reshape(len(alone), layer.shape[0], -1)
                        for name in layer.parameter_names
                    ],
                    dim=2,
                )
                for layer in self._layers
            }

    def _run(
        self,
        scalar: Callable[..., tuple[Tensor, Tensor]],
        tensors: Sequence[Tensor],
        directions: Tensor,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Computes gradients and logits of some samples, one by one if not all at once."""
        if self._batched:
            every = vmap(grad(scalar, has_aux=True), in_dims=(None, 0, 0), randomness="different")
            try:
                with warnings.catch_warnings():
                    # Where attention has no batched form, vmap loops, and says so.
                    warnings.filterwarnings("ignore", "There is a performance drop")
                    # Other parameters may require gradients, of which no graph is wanted here.
                    with torch.no_grad():
                        found, alone = every(self._parameters, list(tensors), directions)
            except (UnsupportedModelError, torch.OutOfMemoryError):
                raise
            except (RuntimeError, ValueError, TypeError, NotImplementedError):
                self._batched = False
            else:
                return found, alone
        gradients: dict[str, list[Tensor]] = {name: [] for name in self._parameters}
        logits = []
        for n, direction in enumerate(directions):
            # Plain autograd, which knows more operations than torch.func does.
            own = {name: p.detach().requires_grad_() for name, p in self._parameters.items()}
            try:
                value, alone = scalar(own, [t[n] for t in tensors], direction)
            except ValueError as error:
                raise MixedSamplesError(error) from error
            # A sample may use none of them, as one that is sent to another expert.
            found_here: Sequence[Tensor | None] = [None] * len(own)
            if value.requires_grad:
                found_here = torch.autograd.grad(value, list(own.values()), allow_unused=True)
            for (name, p), g in zip(own.items(), found_here, strict=True):
                gradients[name].append(torch.zeros_like(p) if g is None else g)
            logits.append(alone)
        stacked = {name: torch.stack(found_there) for name, found_there in gradients.items()}
        return stacked, torch.stack(logits)


class _LogitsModule(nn.Module):
    """A model and the way to get logits from it, as one module."""

    def __init__(self, model: nn.Module, logits_of: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._logits_of = logits_of

    def forward(self, batch: Any) -> Tensor:
        # Attention has a fast path over nested tensors, which have no per-sample gradients. It is
        # not taken where a mode is active, even one that changes nothing. The switch of
        # `torch.backends.mha` would do the same for all threads of the process.
        with BaseTorchFunctionMode():
            return self._logits_of(self.model, batch)
