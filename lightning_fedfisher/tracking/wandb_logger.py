"""W&B runs: one for each client and one for the server, in the group of their federation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeGuard

from lightning.pytorch.loggers import Logger, WandbLogger

from lightning_fedfisher._utils.environment import provenance
from lightning_fedfisher.distributed.lightning_packages import is_lightnings
from lightning_fedfisher.distributed.processes import is_rank_zero
from lightning_fedfisher.tracking import logged_keys as keys
from lightning_fedfisher.update.client_update import ClientUpdate

WandbMode = Literal["online", "offline", "disabled"]


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
    """Opens the W&B run of one client or of the server, as a logger for its Trainer.

    All runs of a federation share a W&B group and differ in their job type. A client that is
    started again, for example after an interruption, continues its own run. Call
    ``wandb.finish()`` before the run of another client is opened in the same process.

    Args:
        federation: The federation's name, which becomes the W&B group of the run.
        client: The client's name; None for the server's run.
        project: The W&B project.
        name: The run's name; None for the client's name, or ``"server"``.
        tags: W&B tags of the run.
        config: Settings to store with the run, beside the versions and the state of git.
        mode: Whether W&B sends the run, keeps it on disk, or records nothing.
        save_dir: The folder for W&B's own files.
        log_model: Whether the update or the merged model is uploaded, as in `WandbLogger`.
        **options: Other arguments of `wandb.init`, such as ``entity`` or ``notes``.

    Returns:
        Lightning's `WandbLogger`, with its run open on rank 0.

    Raises:
        ValueError: If the run of another client, or any other run, is open in this process.

    Example:
        >>> import wandb
        >>> logger = federation_logger("clinics", client="ward-3", mode="disabled")
        >>> logger.name
        'lightning-fedfisher'
        >>> wandb.finish()
    """
    import wandb

    job = "server" if client is None else "client"
    name = name or client or "server"
    run_id = sha256("\0".join((project, federation, job, name)).encode()).hexdigest()[:16]
    # Absolute: W&B's own process may have been started in another folder.
    folder = Path(save_dir).absolute()
    same: dict[str, Any] = {"project": project, "name": name, "save_dir": folder}
    if not is_rank_zero():
        return WandbLogger(id=run_id, **same)  # which opens a run on rank 0 only
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
        dir=folder,
        mode=mode,
        **options,
    )
    # As a WandbLogger does with a run that it opens itself.
    run.define_metric(keys.GLOBAL_STEP)
    run.define_metric("*", step_metric=keys.GLOBAL_STEP, step_sync=True)
    return WandbLogger(experiment=run, log_model=log_model, **same)


def is_wandb(logger: Logger) -> TypeGuard[WandbLogger]:
    """Tells whether a logger is Lightning's for W&B, whichever of Lightning's packages made it.

    Args:
        logger: Any logger of a Trainer.
    """
    return is_lightnings(logger, "WandbLogger")


def may_upload(logger: WandbLogger) -> bool:
    """Tells whether the user lets W&B have models; an update reveals as much as a model.

    Args:
        logger: A logger whose run is open.

    Returns:
        True if ``log_model`` was set and the run is online.
    """
    return bool(logger._log_model) and not logger.experiment.offline


def update_artifact_name(update: ClientUpdate) -> str:
    """Names the W&B artifact of an update.

    Args:
        update: An update.

    Returns:
        A name by the file's content, so that the server, which has the file alone, finds what the
        client uploaded.
    """
    return f"client-update-{update.digest[:16]}"
