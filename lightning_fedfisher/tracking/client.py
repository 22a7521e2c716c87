"""What a client logs: how far its extraction is, and what its update holds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_fedfisher.curvature.summary import CurvatureSummary
from lightning_fedfisher.distributed.processes import is_rank_zero
from lightning_fedfisher.tracking import logged_keys as keys
from lightning_fedfisher.tracking.wandb_logger import is_wandb, may_upload, update_artifact_name
from lightning_fedfisher.update.client_update import ClientUpdate

_SECONDS_BETWEEN_LOGS = 5.0


def warn_of_used_runs(loggers: Iterable[Logger]) -> None:
    """Warns if a W&B run already holds an update, because a second client continues it.

    Args:
        loggers: The loggers of a client's Trainer, before its fit.
    """
    for logger in loggers if is_rank_zero() else ():
        if is_wandb(logger):
            run = logger.experiment
            known = run.summary.keys()
            if any(key.endswith(f"/{keys.DIGEST}") for key in known):
                rank_zero_warn(
                    f"the W&B run {run.name} already holds a client's update: if that is another "
                    "client, call wandb.finish() between clients"
                )


def progress_log(loggers: Sequence[Logger], prefix: str) -> Callable[[int, int | None], None]:
    """Makes a function that logs how far a long extraction is, at most every five seconds.

    Args:
        loggers: The loggers of the client's Trainer.
        prefix: What every logged key starts with.

    Returns:
        A function of the samples done and of all samples, None where their number is not known.
    """
    started = logged = time.monotonic()
    samples = keys.join(prefix, keys.EXTRACTED_SAMPLES)
    seconds = keys.join(prefix, keys.EXTRACTION_SECONDS)

    def log(done: int, total: int | None) -> None:
        nonlocal logged
        now = time.monotonic()
        if now - logged < _SECONDS_BETWEEN_LOGS:
            return
        if logged == started:
            for logger in loggers if is_rank_zero() else ():
                if is_wandb(logger):
                    logger.experiment.define_metric(samples, step_metric=seconds)
        logged = now
        for logger in loggers:
            logger.log_metrics({samples: float(done), seconds: now - started})

    return log


def log_update(
    loggers: Iterable[Logger],
    prefix: str,
    update: ClientUpdate,
    curvature: Sequence[CurvatureSummary],
    metrics: Mapping[str, float],
    step: int,
) -> None:
    """Logs what a client's update holds, and uploads the file if W&B may have it.

    Args:
        loggers: The loggers of the client's Trainer, on rank 0.
        prefix: What every logged key starts with.
        update: The update, opened from its file.
        curvature: A summary of each layer's curvature; empty if it says nothing.
        metrics: Further scalars by their keys, without the prefix.
        step: The global step of the training.
    """
    scalars = {keys.join(prefix, name): value for name, value in metrics.items()}
    for layer in curvature:
        scalars[keys.join(prefix, keys.TRACE, layer.layer)] = layer.trace
        scalars[keys.join(prefix, keys.EFFECTIVE_RANK, layer.layer)] = layer.effective_rank
    for logger in loggers:
        logger.log_metrics(scalars, step=step)
        if is_wandb(logger):
            if curvature:
                _log_curvature(logger, prefix, curvature, step)
            run = logger.experiment
            run.summary.update(
                {
                    keys.join(prefix, keys.UPDATE): update.source,
                    keys.join(prefix, keys.DIGEST): update.digest,
                }
            )
            if may_upload(logger):
                import wandb

                facts = {"digest": update.digest, "num_samples": update.num_samples}
                artifact = wandb.Artifact(
                    update_artifact_name(update), "client-update", metadata=facts
                )
                artifact.add_file(update.source)
                run.log_artifact(artifact)


def _log_curvature(
    logger: WandbLogger, prefix: str, curvature: Sequence[CurvatureSummary], step: int
) -> None:
    """Logs a table of the layers, and a chart of those whose eigenvalues are known."""
    import wandb

    rows = [[c.layer, c.trace, c.effective_rank] for c in curvature]
    titles = ["layer", "trace", "effective rank"]
    logger.log_table(keys.join(prefix, keys.CURVATURE), titles, rows, step=step)
    shown = [layer for layer in curvature if layer.spectrum and layer.spectrum[0] > 0]
    if not shown:
        return
    xs, ys = [], []
    for layer in shown:
        # Relative to the largest, so that layers of any size stand side by side.
        found = [value / layer.spectrum[0] for value in layer.spectrum]
        above = [(i / max(len(found) - 1, 1), math.log10(v)) for i, v in enumerate(found) if v > 0]
        xs.append([rank for rank, _ in above])
        ys.append([value for _, value in above])
    chart = wandb.plot.line_series(
        xs=xs,
        ys=ys,
        keys=[layer.layer for layer in shown],
        title="Eigenvalues of the curvature, log10 of shares of the largest",
        xname="rank, as a share of all",
    )
    logger.log_metrics(cast(Any, {keys.join(prefix, keys.SPECTRUM): chart}), step=step)
