"""What a server logs: how its merge goes, how the clients stand to it, and the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_fedfisher._utils.text import terminal_text
from lightning_fedfisher.merge.influence_cap import MEASURES
from lightning_fedfisher.merge.layer_state import LayerState
from lightning_fedfisher.tracking import logged_keys as keys
from lightning_fedfisher.tracking.wandb_logger import is_wandb, may_upload, update_artifact_name
from lightning_fedfisher.update.client_update import ClientUpdate


def define_merge_axes(loggers: Iterable[Logger]) -> None:
    """Has W&B draw residual and objective over the solvers' iterations instead of epochs.

    Args:
        loggers: The loggers of the server's Trainer, on rank 0, before its fit.
    """
    for logger in loggers:
        if is_wandb(logger):
            start = f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""
            axis = f"{start}{keys.ITERATIONS}"
            for name in (keys.RESIDUAL, keys.OBJECTIVE):
                logger.experiment.define_metric(f"{start}{name}", step_metric=axis)


def layer_metrics(names: Sequence[str], states: Sequence[LayerState]) -> dict[str, float]:
    """Makes the scalars that tell how far the merge of each layer has come.

    Args:
        names: The layers' names.
        states: How far each layer has come.

    Returns:
        Iterations and residual of every layer by key.

    Example:
        >>> layer_metrics(["fc"], [LayerState.waiting(clients=2)])
        {'iterations/fc': 0.0, 'residual/fc': 1.0}
    """
    metrics: dict[str, float] = {}
    for name, state in zip(names, states, strict=True):
        metrics[keys.join(keys.ITERATIONS, name)] = float(state.iterations)
        metrics[keys.join(keys.RESIDUAL, name)] = state.residual
    return metrics


def log_merge(
    loggers: Iterable[Logger],
    layers: Sequence[str],
    clients: Sequence[str],
    distances: Tensor,
    influence: Tensor,
    step: int,
) -> None:
    """Logs how far each client is from the merged model, and how much it decided.

    Args:
        loggers: The loggers of the server's Trainer, on rank 0.
        layers: The layers' names.
        clients: The clients' names.
        distances: Distance from the merge in the client's Fisher norm, of shape
            ``(layers, clients)``, as in `FisherMergeModule.distances`.
        influence: Multiples of the median client's influence by each of `MEASURES`, of shape
            ``(layers, clients, 3)``, as in `FisherMergeModule.influence`.
        step: The global step of the merge.
    """
    whole, most = distances.square().sum(0).sqrt().tolist(), influence.amax((0, 2)).tolist()
    scalars = {
        keys.join(keys.DISTANCE, client): own for client, own in zip(clients, whole, strict=True)
    }
    scalars |= {
        keys.join(keys.INFLUENCE, client): own for client, own in zip(clients, most, strict=True)
    }
    for logger in loggers:
        logger.log_metrics(scalars, step=step)
        if is_wandb(logger):
            titles = ["layer", "client", "distance to the merge"]
            titles += [f"{measure}, times the median client's" for measure in MEASURES]
            rows = [
                [layer, client, float(distances[i, k]), *influence[i, k].tolist()]
                for i, layer in enumerate(layers)
                for k, client in enumerate(clients)
            ]
            logger.log_table(keys.CLIENTS, titles, rows, step=step)


def log_merged_model(
    logger: WandbLogger, path: str | Path, updates: Sequence[ClientUpdate]
) -> None:
    """Uploads a merged model as a W&B artifact that names the clients' updates as its inputs.

    A run that is offline, or whose logger uploads no models (``log_model``), names the file only.

    Args:
        logger: The logger of the server's run.
        path: The model's file.
        updates: The updates it was merged from, opened from their files.

    Example:
        >>> import wandb
        >>> from lightning_fedfisher import federation_logger
        >>> logger = federation_logger("clinics", mode="disabled")
        >>> log_merged_model(logger, "merged.safetensors", updates=[])
        >>> logger.experiment.summary["merged_model"]
        'merged.safetensors'
        >>> wandb.finish()
    """
    import wandb

    run = logger.experiment
    run.summary.update({keys.MERGED_MODEL: str(path)})
    if not may_upload(logger):
        return
    for update in updates:
        try:
            run.use_artifact(f"{update_artifact_name(update)}:latest")
        except (wandb.errors.CommError, ValueError) as error:
            told = f"W&B does not have the update {update.source}: {error}"
            rank_zero_warn(terminal_text(told))
    artifact = wandb.Artifact("merged-model", "model")
    artifact.add_file(str(path))
    run.log_artifact(artifact)
