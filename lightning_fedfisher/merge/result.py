"""What a merge gives: the model, how it was found, and what each client contributed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lightning_fedfisher._utils.text import client_names
from lightning_fedfisher.layers import Layer
from lightning_fedfisher.merge.layer_state import LayerState, Progress
from lightning_fedfisher.update.client_update import ClientUpdate


@dataclass(frozen=True)
class ClientContribution:
    """What one client brought into a merge.

    Attributes:
        name: A short name, from the path of its file.
        source: The file, or a word for an update in memory.
        num_samples: Training samples that it holds.
        weight: Its weight in the merge by its samples alone; all clients' sum to one.
        upload_bytes: Bytes of its update file.
        digest: SHA-256 of its update.

    Example:
        >>> client = ClientContribution("ann", "ann.safetensors", 100, 0.25, 4096, "c0ffee")
        >>> f"{client.name} weighs {client.weight:.0%}"
        'ann weighs 25%'
    """

    name: str
    source: str
    num_samples: int
    weight: float
    upload_bytes: int
    digest: str


@dataclass(frozen=True)
class LayerResult:
    """How the merge of one layer went.

    Attributes:
        name: The layer's name.
        shape: Rows and columns of its matrix.
        iterations: Steps that its solver made.
        objective: Value of the layer's quadratic at the merged weights.
        residual: Norm of the gradient there, relative to the clients' gradients at the average.
        solved: Whether the solver reached what the method promises.
        bits: Bits of the numbers that it was solved with: 32, or 64 where float32 could not reach
            the tolerance, and for models in float64. With 32, large factors were decomposed
            in float32 as well where that reproduced them. 0 if the layer was not begun.
        agreement: How much of what the clients' weights compute the solver's last ones keep, in the
            norms that the method merges with: ``1 - Q(W) / Q(0)`` with the layer's quadratic ``Q``,
            1 where all clients agree. Weights of an aligned layer are those for the merged model's
            inputs. None until the layer is done, and of least-squares fits, which are to differ.

    Example:
        >>> layer = LayerResult("fc", (10, 65), 12, 0.5, 8e-5, solved=True)
        >>> layer.name, layer.iterations
        ('fc', 12)
    """

    name: str
    shape: tuple[int, int]
    iterations: int
    objective: float
    residual: float
    solved: bool
    bits: int = 0
    agreement: float | None = None


@dataclass(frozen=True)
class MergeResult:
    """The merged model, and all that the server knows of how it came about.

    Attributes:
        state_dict: The merged parameters and buffers by name, on the CPU, in the clients' dtypes.
            Parameters that the clients had frozen are not among them: the model brings its own.
        method: Name of the merge method.
        max_influence: What a client could weigh in a layer, as a multiple of the median client's.
        layers: How the merge of each layer went.
        clients: What each client contributed, in the order of the updates.
        distances: How far each layer was moved from each client, in the client's own Fisher norm,
            of shape ``(layers, clients)``; zeros for layers that are not done.
        influence: What each client weighed in each layer before it was capped, as multiples of the
            median client's, of shape ``(layers, clients, 3)`` (see `influence_cap.MEASURES`).
        history: For each epoch the ``iterations``, ``objective`` and ``residual`` of all layers,
            with ``val_...`` scores where there was a validation loader.
        warnings: What a user should look at: layers that are not solved, outliers, BatchNorm
            statistics of other weights, and layers in which clients disagree.
        server_labels: Labelled samples that decided which iterate is returned.
        curvature: Curvature that the clients extracted.
        fisher: Fisher type that the clients extracted.
        likelihood: Likelihood of the clients' labels.
        model_fingerprint: SHA-256 of the model's parameter names, shapes and dtypes.
        fedavg_bytes: Bytes that a FedAvg client would send.
        seconds: Wall-clock time of the merge itself, without opening and checking the updates; None
            before it has ended.
        unlabelled_samples: Samples, without labels, that running statistics were estimated on.
        similarity: How alike the clients' layers compute, at most 1 (`carried_statistics`); None if
            it is not known, or nothing depends on it.

    Example:
        >>> from torch import nn
        >>> from lightning_fedfisher.layers import find_layers
        >>> from lightning_fedfisher.merge import merge_updates
        >>> from lightning_fedfisher.update import UpdateHeader
        >>> model = nn.Linear(2, 1)
        >>> header = UpdateHeader(
        ...     10, "identity", "", "categorical", 0, find_layers(model), {"weight": "identity"}
        ... )
        >>> update = ClientUpdate.from_model(model, header, {})
        >>> result = merge_updates([update, update], method="fedavg", allow_duplicates=True)
        >>> result.solved, [client.weight for client in result.clients]
        (True, [0.5, 0.5])
    """

    state_dict: Mapping[str, Tensor] = field(repr=False)
    method: str
    max_influence: float
    layers: tuple[LayerResult, ...]
    clients: tuple[ClientContribution, ...]
    distances: Tensor
    influence: Tensor
    history: tuple[Mapping[str, float], ...]
    warnings: tuple[str, ...]
    server_labels: int
    curvature: str
    fisher: str
    likelihood: str
    model_fingerprint: str
    fedavg_bytes: int
    seconds: float | None = None
    unlabelled_samples: int = 0
    similarity: float | None = None

    @property
    def solved(self) -> bool:
        """Whether every layer's solver reached what the method promises."""
        return all(layer.solved for layer in self.layers)


def layer_results(
    layers: Sequence[Layer], states: Sequence[LayerState], converges: bool, fits: bool
) -> tuple[LayerResult, ...]:
    """Describes how the merge of each layer went.

    Args:
        layers: The layers.
        states: How far each layer has come.
        converges: Whether the method promises the minimum rather than a number of steps.
        fits: Whether the clients' weights are least-squares fits.
    """
    return tuple(
        LayerResult(
            layer.name,
            layer.shape,
            state.iterations,
            state.objective,
            state.residual,
            state.progress is Progress.CONVERGED or (state.done and not converges),
            state.bits,
            state.agreement if state.done and not fits else None,
        )
        for layer, state in zip(layers, states, strict=True)
    )


def contributions(
    updates: Sequence[ClientUpdate], client_weights: Sequence[float]
) -> tuple[ClientContribution, ...]:
    """Describes what each client brings into a merge.

    Args:
        updates: The updates of all clients.
        client_weights: A positive number for each client, of any sum.
    """
    names, total = client_names([update.source for update in updates]), sum(client_weights)
    return tuple(
        ClientContribution(
            name, update.source, update.num_samples, p / total, update.upload_bytes, update.digest
        )
        for name, update, p in zip(names, updates, client_weights, strict=True)
    )
