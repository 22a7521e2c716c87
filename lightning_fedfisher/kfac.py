"""Kronecker factors of the Fisher, through forward and backward hooks.

For a layer with inputs ``a`` (the bias adding a constant 1) and back-propagated residual directions
``g`` at its outputs, ``F = G (x) A``. Where a layer is applied at ``T`` positions of a sample (a
convolution, a Linear over a sequence), ``A`` is the mean over positions and ``G`` the sum over
positions, both the mean over samples (Grosse & Martens, 2016, with spatially uncorrelated
derivatives; "expand" of Eschenhagen et al., 2023). It is exact for one sample without weight
sharing, and for deep linear networks whose residual directions do not depend on the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional

from lightning_fedfisher.curvature import Kronecker
from lightning_fedfisher.layers import (
    Layer,
    UnsupportedModelError,
    is_plain,
    no_gradient_reaches,
    same_padding,
)

_ForwardHook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


class KroneckerSums:
    """Sums of ``a a'`` and ``g g'`` over samples, collected while a model runs.

    Attributes:
        sums: for each layer the tensors ``output_factor`` and ``input_factor``, additive over
            batches and processes.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        """Registers the hooks.

        Args:
            model: a throw-away copy: its hooks stay and its parameters leave the graph.
            layers: the layers to collect.
        """
        self.sums: dict[str, dict[str, Tensor]] = {}
        self._graph_starts: list[Tensor] = []
        self._edges: list[GradientEdge] = []
        self._unreached: set[str] = set()
        # Gradients at the outputs are all that is needed: back-propagation to the weights is
        # a third of the work of a training step, and is never asked for.
        model.requires_grad_(False)
        for layer in layers:
            module = model.get_submodule(layer.module_name)
            weight = next(module.parameters())
            rows, columns = layer.shape
            self.sums[layer.name] = {
                "output_factor": weight.new_zeros(rows, rows),
                "input_factor": weight.new_zeros(columns, columns),
            }
            module.register_forward_hook(self._collector(layer))

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        """Why a module's curvature has no Kronecker form here, or None if it has."""
        if not is_plain(module, (nn.Linear, nn.Conv2d)):
            return 'has no Kronecker factors: use curvature="diagonal", or Linear and Conv2d layers'
        if isinstance(module, nn.Conv2d) and module.groups != 1:
            return 'Kronecker factors of a grouped convolution are missing: use "diagonal"'
        if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            return f"padding_mode={module.padding_mode!r} is not supported: use zeros"
        return None

    def add(self, logits: Tensor, directions: Tensor) -> None:
        """Back-propagates directions and adds their second moments.

        Args:
            logits: of the batch whose forward pass just ran, shape ``(samples, classes)``.
            directions: of shape ``(n, samples, classes)``.
        """
        starts = self._graph_starts or self._edges
        self._graph_starts, self._edges = [], []
        self._unreached = set(self.sums)
        for index, direction in enumerate(directions):
            # The result is not looked at: the hooks that run on the way collect what is needed.
            torch.autograd.grad(
                logits,
                starts,
                direction,
                retain_graph=index + 1 < len(directions),
                allow_unused=True,
            )
        if self._unreached:
            raise UnsupportedModelError(no_gradient_reaches(self._unreached))

    @staticmethod
    def finish(layer: Layer, sums: dict[str, Tensor], count: int) -> Kronecker:
        """The curvature of one layer, from its sums over `count` samples."""
        return Kronecker(sums["output_factor"] / count, sums["input_factor"] / count)

    def _collector(self, layer: Layer) -> _ForwardHook:
        sums = self.sums[layer.name]
        has_bias = len(layer.parameters) == 2

        def collect(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return output
            a, positions = _input_patches(module, inputs[0].detach())
            if has_bias:
                a = torch.cat([a, a.new_ones(1, a.shape[1])])
            sums["input_factor"].addmm_(a, a.mT, alpha=1 / positions)
            if not output.requires_grad:
                start = output.detach().requires_grad_()
                self._graph_starts.append(start)
                # A clone, because an in-place activation must not write to a leaf.
                output = start.clone()
            self._edges.append(get_gradient_edge(output))

            def collect_output_gradient(gradient: Tensor) -> None:
                self._unreached.discard(layer.name)
                g = _output_rows(module, gradient)
                sums["output_factor"].addmm_(g, g.mT)

            # On the tensor rather than the module: it then sees the gradient before any in-place
            # change of the output.
            output.register_hook(collect_output_gradient)  # type: ignore[no-untyped-call]
            return output

        return collect


def _input_patches(module: nn.Module, inputs: Tensor) -> tuple[Tensor, int]:
    """What each output position of a layer sees: ``(in, samples * positions)``, and positions."""
    if isinstance(module, nn.Conv2d):
        # Last dimension first, as `functional.pad` wants it.
        zeros = [side for pair in reversed(same_padding(module)) for side in pair]
        padded = functional.pad(inputs, zeros)
        patches = functional.unfold(
            padded, module.kernel_size, dilation=module.dilation, stride=module.stride
        )
        return patches.transpose(0, 1).flatten(1), patches.shape[2]
    samples, features = inputs.shape[0], inputs.shape[-1]
    return inputs.reshape(-1, features).mT, inputs.numel() // (samples * features)


def _output_rows(module: nn.Module, gradient: Tensor) -> Tensor:
    """Gradients at a layer's outputs as ``(out, samples * positions)``."""
    if isinstance(module, nn.Conv2d):
        return gradient.transpose(0, 1).flatten(1)
    return gradient.reshape(-1, gradient.shape[-1]).mT
