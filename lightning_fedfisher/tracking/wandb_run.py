"""What a federation tells its loggers: runs that belong together, and what only W&B can show.

Scalars go to every Lightning logger. Tables, custom charts and artifacts go to a `WandbLogger`, by
the ways its documentation gives; without one nothing is missing but them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, cast

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_fedfisher._utils.environment import provenance
from lightning_fedfisher.distributed.processes import is_rank_zero
from lightning_fedfisher.merge.influence_cap import MEASURES
from lightning_fedfisher.results.record import FederationRecord, LayerCurvature, ModelScore
from lightning_fedfisher.update.client_update import ClientUpdate

WandbMode = Literal["online", "offline", "disabled"]

_DIGEST = "/digest"
_EVERY_SECONDS = 5.0


def federation_logger(
    federation: str,
    client: str | None = None,
    *,
    project: str = "lightning-fedfisher",
    name: str | None = None,
    tags: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    mode: WandbMode = "online",
    save_dir: str | Path = ".",
    log_model: Literal["all"] | bool = False,
    **options: Any,
) -> WandbLogger:
    """Opens the W&B run of one client, or of the server, among those of its federation.

    All runs of a federation share a group and differ in their job type. The same federation and
    client go on in the same run, as after an interruption; finish it (``wandb.finish()``) before
    another is opened in the same process.

    Args:
        federation: name of the group.
        client: name of the client; the server's run if None.
        project: of W&B.
        name: of the run; the client's, or ``"server"``, if None.
        tags: of the run.
        config: added to the versions and the state of git, which every run tells.
        mode: of W&B.
        save_dir: folder for W&B's own files.
        log_model: whether W&B may have the update or the merged model (as `WandbLogger` has it).
        **options: anything else that `wandb.init` takes, as ``entity`` or ``notes``.

    Returns:
        The logger, its run open.

    Raises:
        ValueError: if another run is still open in this process.
    """
    import wandb

    job = "server" if client is None else "client"
    name = name or client or "server"
    run_id = sha256("\0".join((project, federation, job, name)).encode()).hexdigest()[:16]
    same: dict[str, Any] = {"project": project, "name": name, "save_dir": save_dir}
    if not is_rank_zero():
        return WandbLogger(id=run_id, **same)  # which opens no run outside the first process
    if wandb.run is not None and wandb.run.id != run_id:
        raise ValueError(
            f"the W&B run {wandb.run.name} is still open, and {name} would go on in it: call "
            "wandb.finish() before"
        )
    run = wandb.run or wandb.init(
        project=project,
        group=federation,
        job_type=job,
        name=name,
        id=run_id,
        resume="allow",
        tags=list(tags),
        config={**provenance(), **(config or {})},
        dir=save_dir,
        mode=mode,
        **options,
    )
    # As a WandbLogger does with a run that it opens itself.
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return WandbLogger(experiment=run, log_model=log_model, **same)


def warn_of_used_runs(loggers: Iterable[Logger]) -> None:
    """Warns if a W&B run already holds an update, as where a second client goes on in its run.

    Args:
        loggers: of a client's Trainer, before its fit.
    """
    for logger in loggers if is_rank_zero() else ():
        if isinstance(logger, WandbLogger):
            run = logger.experiment
            known = run.summary.keys()
            if any(key.endswith(_DIGEST) for key in known):
                rank_zero_warn(
                    f"the W&B run {run.name} already holds a client's update: if that is another "
                    "client, call wandb.finish() between clients"
                )


def progress_log(loggers: Sequence[Logger], prefix: str) -> Callable[[int, int | None], None]:
    """Logs how far a long extraction is, at most every five seconds.

    Args:
        loggers: of the client's Trainer.
        prefix: of all names.

    Returns:
        What to tell of samples done, and of how many.
    """
    started = logged = time.monotonic()
    samples, seconds = f"{prefix}/extracted_samples", f"{prefix}/extraction_seconds"

    def tell(done: int, total: int | None) -> None:
        nonlocal logged
        now = time.monotonic()
        if now - logged < _EVERY_SECONDS:
            return
        if logged == started:
            for logger in loggers if is_rank_zero() else ():
                if isinstance(logger, WandbLogger):
                    logger.experiment.define_metric(samples, step_metric=seconds)
        logged = now
        for logger in loggers:
            logger.log_metrics({samples: float(done), seconds: now - started})

    return tell


def log_update(
    loggers: Iterable[Logger],
    prefix: str,
    update: ClientUpdate,
    curvature: Sequence[LayerCurvature],
    metrics: Mapping[str, float],
    step: int,
) -> None:
    """Tells of a client's update.

    Args:
        loggers: of its Trainer, on the first process.
        prefix: of all names.
        update: opened from the file it was written to.
        curvature: of each layer.
        metrics: further scalars.
        step: of the training.
    """
    scalars = {f"{prefix}/{name}": value for name, value in metrics.items()}
    for layer in curvature:
        scalars[f"{prefix}/trace/{layer.layer}"] = layer.trace
        scalars[f"{prefix}/effective_rank/{layer.layer}"] = layer.effective_rank
    for logger in loggers:
        logger.log_metrics(scalars, step=step)
        if isinstance(logger, WandbLogger):
            if curvature:
                _show_curvature(logger, prefix, curvature, step)
            run = logger.experiment
            run.summary.update(
                {f"{prefix}/update": update.source, f"{prefix}{_DIGEST}": update.digest}
            )
            if _uploads(logger):
                import wandb

                facts = {"digest": update.digest, "num_samples": update.num_samples}
                artifact = wandb.Artifact(_artifact_name(update), "client-update", metadata=facts)
                artifact.add_file(update.source)
                run.log_artifact(artifact)


def _show_curvature(
    logger: WandbLogger, prefix: str, curvature: Sequence[LayerCurvature], step: int
) -> None:
    import wandb

    rows = [[c.layer, c.trace, c.effective_rank] for c in curvature]
    logger.log_table(f"{prefix}/curvature", ["layer", "trace", "effective rank"], rows, step=step)
    shown = [layer for layer in curvature if layer.spectrum and layer.spectrum[0] > 0]
    if not shown:
        return
    xs, ys = [], []
    for layer in shown:
        # Shares of the largest: layers of any size side by side.
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
    logger.log_metrics(cast(Any, {f"{prefix}/spectrum": chart}), step=step)


def define_merge_axes(loggers: Iterable[Logger]) -> None:
    """Draws residual and objective of a merge over the solvers' iterations, not over sweeps.

    Args:
        loggers: of the server's Trainer, on the first process.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            start = f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""
            for name in ("residual", "objective"):
                logger.experiment.define_metric(f"{start}{name}", step_metric=f"{start}iterations")


def log_merge(
    loggers: Iterable[Logger],
    layers: Sequence[str],
    clients: Sequence[str],
    distances: Tensor,
    influence: Tensor,
    step: int,
) -> None:
    """Tells how the clients stand to a merged model.

    Args:
        loggers: of the server's Trainer, on the first process.
        layers: names.
        clients: names.
        distances: `FisherMergeModule.distances`.
        influence: `FisherMergeModule.influence`.
        step: of the merge.
    """
    whole, most = distances.square().sum(0).sqrt().tolist(), influence.amax((0, 2)).tolist()
    scalars = {f"distance/{client}": own for client, own in zip(clients, whole, strict=True)}
    scalars |= {f"influence/{client}": own for client, own in zip(clients, most, strict=True)}
    for logger in loggers:
        logger.log_metrics(scalars, step=step)
        if isinstance(logger, WandbLogger):
            titles = ["layer", "client", "distance to the merge"]
            titles += [f"{measure}, times the median client's" for measure in MEASURES]
            rows = [
                [layer, client, float(distances[i, k]), *influence[i, k].tolist()]
                for i, layer in enumerate(layers)
                for k, client in enumerate(clients)
            ]
            logger.log_table("clients", titles, rows, step=step)


def log_federation(logger: WandbLogger, record: FederationRecord) -> None:
    """Shows a whole federation in the server's run.

    Args:
        logger: of that run.
        record: of the federation.
    """
    import wandb

    logger.log_table("comparison", *_comparison(record))
    scores = [(name, score) for name, score in _scores(record) if score is not None]
    if scores:
        rows: list[Any] = [[name, score.accuracy] for name, score in scores]
        bars = wandb.Table(["model", "accuracy, %"], rows)
        chart = wandb.plot.bar(bars, "model", "accuracy, %", title="Accuracy on the test set")
        logger.log_metrics(cast(Any, {"accuracy": chart}))
    counts = [len(client.class_counts) for client in record.clients]
    if counts and all(counts):
        titles = ["client", "samples", *(f"class {k}" for k in range(max(counts)))]
        rows = [[c.name, c.num_samples, *c.class_counts] for c in record.clients]
        logger.log_table("partition", titles, rows)
    merged = record.merges[0].score if record.merges else None
    for key, title, score in (
        ("confusion/before", "The best single client's model", record.best_client),
        ("confusion/after", "The merged model", merged),
    ):
        if score is not None and score.confusion:
            logger.log_metrics(cast(Any, {key: _confusion(score, title)}))


def _confusion(score: ModelScore, title: str) -> Any:
    """W&B's own chart of a confusion matrix, from counts."""
    import wandb

    rows: list[Any] = [
        [f"class {actual}", f"class {predicted}", count]
        for actual, row in enumerate(score.confusion)
        for predicted, count in enumerate(row)
    ]
    return wandb.plot_table(
        "wandb/confusion_matrix/v1",
        wandb.Table(["Actual", "Predicted", "nPredictions"], rows),
        {name: name for name in ("Actual", "Predicted", "nPredictions")},
        {"title": title},
    )


def _scores(record: FederationRecord) -> list[tuple[str, ModelScore | None]]:
    merged = [(merge.method, merge.score) for merge in record.merges]
    return [
        ("best single client", record.best_client),
        ("ensemble of clients", record.ensemble),
        *merged,
    ]


def _comparison(record: FederationRecord) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of what each model is good for, and what it cost."""
    merges: dict[str, Any] = {merge.method: merge for merge in record.merges}
    fields = (
        *("upload_bytes", "fedavg_bytes"),
        *("client_seconds", "server_seconds", "server_labels"),
    )
    titles = ["model", "accuracy, %", "NLL", "calibration error, %", "bytes sent", "FedAvg's bytes"]
    titles += ["client's seconds", "server's seconds", "labels used"]
    rows = []
    for name, score in _scores(record):
        numbers = [score.accuracy, score.nll, score.calibration_error] if score else [None] * 3
        costs = [getattr(merges.get(name), field, None) for field in fields]
        if score or name in merges:
            rows.append([name, *numbers, *costs])
    return titles, rows


def log_merged_model(
    logger: WandbLogger, path: str | Path, updates: Sequence[ClientUpdate]
) -> None:
    """Uploads a merged model as an artifact made from the clients' updates.

    That is if the logger uploads models (``log_model``), online; else the run names the file.

    Args:
        logger: of the server's run.
        path: of the model's file.
        updates: what it was merged from.
    """
    import wandb

    run = logger.experiment
    run.summary.update({"merged_model": str(path)})
    if not _uploads(logger):
        return
    for update in updates:
        try:
            run.use_artifact(f"{_artifact_name(update)}:latest")
        except (wandb.errors.CommError, ValueError) as error:
            rank_zero_warn(f"W&B does not have the update {update.source}: {error}")
    artifact = wandb.Artifact("merged-model", "model")
    artifact.add_file(str(path))
    run.log_artifact(artifact)


def _uploads(logger: WandbLogger) -> bool:
    """Whether the user lets models go to W&B; an update is as much as a model."""
    return bool(logger._log_model) and not logger.experiment.offline


def _artifact_name(update: ClientUpdate) -> str:
    # By content, so that the server finds what a client uploaded, by its file alone.
    return f"client-update-{update.digest[:16]}"
