"""The last layer of a model, fitted to a client's labels in closed form.

With the rest of a network as it is, the linear layer at its end has a least-squares problem: bring
the outputs close to the labels, classes written as ones and zeros. Its solution takes one forward
pass, and no training. Its quadratic is no approximation: the sum over clients is the problem that
all their samples pose together, however they are split (He et al., 2025, "AFL: A Single-Round
Analytic Approach for Federated Learning with Pre-trained Models").
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fedfisher._utils.unwrapping import unwrapped
from lightning_fedfisher.curvature.input_gram import InputGram
from lightning_fedfisher.curvature.linalg import least_squares
from lightning_fedfisher.distributed.processes import Shard
from lightning_fedfisher.distributed.progress import samples_bar
from lightning_fedfisher.errors import UnsupportedModelError
from lightning_fedfisher.extraction.accumulators.gram import GramSum
from lightning_fedfisher.extraction.batches import BatchRunner
from lightning_fedfisher.extraction.layer_report import LayerReport
from lightning_fedfisher.extraction.layer_types.base import append_ones
from lightning_fedfisher.extraction.layer_types.linear import Linear
from lightning_fedfisher.extraction.model_copy import (
    copy_model,
    first_buffers,
    frozen_copy,
    isolated,
)
from lightning_fedfisher.extraction.options import ExtractionOptions
from lightning_fedfisher.extraction.result import ExtractedCurvature
from lightning_fedfisher.extraction.sampling import partition_samples
from lightning_fedfisher.extraction.tracing.recorder import LayerCallRecorder, WatchedCall
from lightning_fedfisher.layers import Layer, aliases, find_layers
from lightning_fedfisher.likelihoods.registry import LIKELIHOODS
from lightning_fedfisher.update.header import LeastSquaresFit


def extract_closed_form_head(
    model: nn.Module,
    dataloader: Iterable[Any],
    head: str | None = None,
    options: ExtractionOptions | None = None,
    *,
    prepare: Callable[[Any], Any] | None = None,
    shard: Shard | None = None,
    progress: bool = True,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> ExtractedCurvature:
    """Fits a model's last layer to the labels by least squares, in one forward pass.

    Everything is added up and solved in float64. Where the samples leave the fit open, it is a
    small one (`least_squares`).

    Args:
        model: A model whose other layers are as they shall be: pre-trained, or merged. Whether they
            are frozen does not matter. It is left as it was.
        dataloader: Batches ``(x, y)`` of the client's own samples (see `extract_curvature`).
        head: Name of the layer to fit, as `find_layers` names it, if the outputs of several are
            the logits; None takes the last of them.
        options: Likelihood of the labels, ``forward``, ``batch_size``, ``max_samples`` (where
            ``"auto"`` takes all, and of an iterable a number takes the first, rounded up to whole
            batches) and ``seed``; the other options say nothing here. None takes the defaults of
            `ExtractionOptions`.
        prepare: Function applied to each batch first; None leaves batches as they are.
        shard: The place of this process among several; None stands for a single process.
        progress: Whether to show a progress bar, after two seconds, on rank 0 and on a terminal.
        on_progress: Function called after each batch (see `extract_curvature`).

    Returns:
        The quadratic of the fit, an `InputGram` for one layer, around `ExtractedCurvature.fitted`:
        the model with the fit in place of its head, which alone is trained in it.

    Raises:
        UnsupportedModelError: If there is no such layer, or its outputs are not the logits.
        ValueError: If there are no samples, or a batch or the model's output is unusable.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> lines = ExtractionOptions(likelihood="gaussian")
        >>> found = extract_closed_form_head(nn.Linear(1, 1), [(x, 3 * x + 1)], options=lines)
        >>> weight, bias = found.fitted.parameters()
        >>> round(weight.item(), 6), round(bias.item(), 6), found.fit.squared_error < 1e-12
        (3.0, 1.0, True)
    """
    options = replace(options or ExtractionOptions(), curvature="input_gram")
    shard = shard or Shard()
    started = time.perf_counter()
    model = unwrapped(model)
    samples = partition_samples(
        dataloader,
        max_samples=None if options.max_samples == "auto" else options.max_samples,
        batch_size=options.batch_size,
        seed=options.seed,
        shard=shard,
    )
    with (
        isolated(model),
        samples_bar("closed-form head", shard, progress) as bar,
    ):
        copied = copy_model(model, first_buffers(model, shard))
        runner = options.runner(prepare)
        problem = _HeadProblem(copied, head, options, runner, samples.preview())
        own = samples.run(problem.add, options.max_samples, bar, on_progress)
        weights, gram, fit, count = problem.solve(own, shard)
    layer = problem.layer
    fitted = frozen_copy(model)
    module = fitted.get_submodule(layer.module_name)
    for name, tensor in layer.split(weights).items():
        setattr(module, name.rpartition(".")[2], nn.Parameter(tensor))
    return ExtractedCurvature(
        options,
        (layer,),
        {layer.name: InputGram(gram, rows=layer.shape[0])},
        (LayerReport(layer, InputGram.kind, "hooks"),),
        count,
        samples.population,
        time.perf_counter() - started,
        output_layer=layer.name,
        fitted=fitted,
        fit=fit,
    )


class _HeadProblem:
    """The least-squares problem of a model's head, added up batch by batch.

    Attributes:
        layer: The head.
    """

    def __init__(
        self,
        copied: nn.Module,
        head: str | None,
        options: ExtractionOptions,
        runner: BatchRunner,
        preview: Any,
    ) -> None:
        """Finds the head of a copy of the model, by running a few samples as a preview."""
        self._model, self._runner = copied, runner
        self._likelihood = LIKELIHOODS[options.likelihood]
        for parameter in copied.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        self._watched: tuple[Layer, ...] = find_layers(copied)
        copied.requires_grad_(False)  # no graph is needed
        shared = {*aliases(copied), *aliases(copied).values()}
        _, _, calls = self._run(preview)
        candidates = {layer.name: layer for layer, _, _, is_logits in calls if is_logits}
        chosen = candidates.get(head or next(reversed(candidates), ""))
        if chosen is None:
            which = "no linear layer's" if head is None else f"{head}: it is no layer whose"
            raise UnsupportedModelError(
                [
                    f"{which} outputs are the logits: pass forward= to return the outputs of a "
                    "torch.nn.Linear, without a softmax"
                    + (f" (those are: {', '.join(candidates)})" if candidates else "")
                ]
            )
        if tied := [name for name in chosen.parameter_names if name in shared]:
            raise UnsupportedModelError(
                [f"{tied[0]}: another layer shares it, and would change with the head: untie them"]
            )
        self.layer, self._watched = chosen, (chosen,)
        self._forget_head(preview)
        device = next(copied.parameters()).device
        # Apple's GPUs have no float64.
        self._device = torch.device("cpu") if device.type == "mps" else device
        self._squares = torch.zeros((), dtype=torch.float64, device=self._device)
        self._observations = self._squares.clone()
        self._crossed = self._squares.new_zeros(chosen.shape)
        self._gram = GramSum(chosen.shape[1], like=self._squares)

    def _forget_head(self, preview: Any) -> None:
        """Draws other weights for the head of the copy, which make a difference to its logits.

        All outputs of a head of zeros are alike, whatever is made of them after it.
        """
        generator = torch.Generator().manual_seed(0)
        for name in self.layer.parameter_names:
            parameter = self._model.get_parameter(name)
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(drawn / drawn[0].numel() ** 0.5)
        self._require_logits(self._run(preview)[2])

    def _require_logits(self, calls: Sequence[_Call]) -> None:
        """Refuses a head that is called several times, or whose outputs are not the logits."""
        if len(calls) == 1 and calls[0][3]:
            return
        problem = (
            "its outputs are not the logits: pass forward= to return them as they are"
            if len(calls) == 1
            else f"it is called {len(calls)} times in a forward pass, and a head is called once"
        )
        raise UnsupportedModelError([f"{self.layer.name}: {problem}"])

    def add(self, batch: Any) -> int:
        """Adds a batch, and returns its number of samples."""
        logits, labels, calls = self._run(batch)
        if labels is None:
            raise ValueError("a fit needs labels, and the batch holds none")
        self._require_logits(calls)
        _, inputs, has_bias, _ = calls[0]
        targets = self._likelihood.regressands(logits, labels)
        targets = targets.reshape(-1, self.layer.shape[0]).to(self._device)
        inputs = inputs.to(self._device, torch.float64)
        if has_bias:
            inputs = append_ones(inputs, 1)
        observed = targets.isfinite().all(dim=1)
        if (targets.isfinite().any(dim=1) != observed).any():
            raise ValueError(
                "some outputs of a sample have a label and others have none: a closed-form head "
                "takes samples with all labels or none; leave those out, or pass forward="
            )
        inputs, targets = inputs[observed], targets[observed]
        self._gram.add(inputs.mT.unsqueeze(0), 1.0)
        self._crossed.addmm_(targets.mT, inputs)
        self._squares += targets.square().sum()
        self._observations += len(targets)
        return len(logits)

    def solve(self, samples: int, shard: Shard) -> tuple[Tensor, Tensor, LeastSquaresFit, int]:
        """Solves it for the samples of all processes together.

        Args:
            samples: Number of samples of this process.
            shard: The place of this process.

        Returns:
            The weights, the second moment of the inputs as a mean over samples, what is known of
            the fit, and the number of samples.
        """
        count = round(float(shard.total(torch.tensor([samples]).double().to(self._device))))
        if count == 0:
            raise ValueError("the client holds no samples: there is nothing to fit")
        gram, crossed, squares, observations = (
            shard.total(total).div_(count)
            for total in (self._gram.total(), self._crossed, self._squares, self._observations)
        )
        if not observations:
            raise ValueError("no label of the client is observed: there is nothing to fit")
        weights = least_squares(gram, crossed)
        error = float(squares - (weights * crossed).sum())  # but for rounding, not negative
        return weights, gram, LeastSquaresFit(max(error, 0.0), float(observations)), count

    def _run(self, batch: Any) -> tuple[Tensor, Tensor | None, list[_Call]]:
        """Runs a batch.

        Returns:
            The logits, the labels, and for each call of a linear layer the layer, its inputs in
            rows, whether it has a bias, and whether its outputs are the logits.
        """
        seen: list[tuple[Layer, Tensor, bool, Tensor]] = []

        def note(call: WatchedCall) -> Any:
            output = call.run()
            for layer, layer_type in call.layers:
                if isinstance(layer_type, Linear):
                    inputs = call.arguments.inputs
                    rows = inputs.reshape(-1, inputs.shape[-1]).clone()
                    seen.append((layer, rows, layer_type.has_bias, output))
            return output

        with LayerCallRecorder(self._model, self._watched, note):
            logits, labels = self._runner(self._model, self._runner.prepare(self._model, batch))
        self._likelihood.check_logits(logits)
        by_class = logits.movedim(1, -1) if self._likelihood.softmax else logits
        calls = [
            (layer, rows, has_bias, _is_the_same(output, by_class, layer.shape[0]))
            for layer, rows, has_bias, output in seen
        ]
        return logits, labels, calls


_Call = tuple[Layer, Tensor, bool, bool]


def _is_the_same(output: Tensor, logits: Tensor, width: int) -> bool:
    """Whether a layer's outputs are the logits, position by position."""
    if output.numel() != logits.numel() or output.numel() % width:
        return False
    return torch.allclose(output.reshape(-1, width), logits.reshape(-1, width).to(output))
