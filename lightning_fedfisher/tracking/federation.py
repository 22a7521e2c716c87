"""A whole federation in the server's W&B run: its models compared, and who held what."""

from __future__ import annotations

from typing import Any, cast

from lightning.pytorch.loggers import WandbLogger

from lightning_fedfisher.results.record import FederationRecord, ModelScore
from lightning_fedfisher.tracking import logged_keys as keys


def log_federation(logger: WandbLogger, record: FederationRecord) -> None:
    """Logs the tables and charts of a whole federation to the server's run.

    They are a table of all models with their scores and costs, a chart of their accuracies, a
    table of the clients' samples by class, and the confusion matrices of the best client and of
    the first merge. What the record does not know is left out.

    Args:
        logger: The logger of the server's run.
        record: The record of the federation.

    Example:
        >>> import wandb
        >>> from lightning_fedfisher import federation_logger
        >>> logger = federation_logger("clinics", mode="disabled")
        >>> log_federation(logger, FederationRecord("two clinics", clients=[], merges=[]))
        >>> wandb.finish()
    """
    import wandb

    logger.log_table(keys.COMPARISON, *_comparison(record))
    scores = [(name, score) for name, score in _scores(record) if score is not None]
    if scores:
        rows: list[Any] = [[name, score.accuracy] for name, score in scores]
        bars = wandb.Table(["model", "accuracy, %"], rows)
        chart = wandb.plot.bar(bars, "model", "accuracy, %", title="Accuracy on the test set")
        logger.log_metrics(cast(Any, {keys.ACCURACY: chart}))
    counts = [len(client.class_counts) for client in record.clients]
    if counts and all(counts):
        titles = ["client", "samples", *(f"class {k}" for k in range(max(counts)))]
        rows = [[c.name, c.num_samples, *c.class_counts] for c in record.clients]
        logger.log_table(keys.PARTITION, titles, rows)
    merged = record.merges[0].score if record.merges else None
    for key, title, score in (
        (keys.CONFUSION_BEFORE, "The best single client's model", record.best_client),
        (keys.CONFUSION_AFTER, "The merged model", merged),
    ):
        if score is not None and score.confusion:
            logger.log_metrics(cast(Any, {key: _confusion(score, title)}))


def _confusion(score: ModelScore, title: str) -> Any:
    """Makes W&B's own chart of a confusion matrix from its counts."""
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
    """Names every model that may have been tested, with its score."""
    merged = [(merge.method, merge.score) for merge in record.merges]
    return [
        ("best single client", record.best_client),
        ("ensemble of clients", record.ensemble),
        *merged,
    ]


def _comparison(record: FederationRecord) -> tuple[list[str], list[list[Any]]]:
    """Makes the titles and rows of a table of what each model scores and cost."""
    merges: dict[str, Any] = {merge.method: merge for merge in record.merges}
    fields = (
        *("upload_bytes", "fedavg_bytes"),
        *("client_seconds", "server_seconds", "server_labels", "unlabelled_samples"),
    )
    titles = ["model", "accuracy, %", "NLL", "calibration error, %", "bytes sent", "FedAvg's bytes"]
    titles += ["client's seconds", "server's seconds", "labels used", "unlabelled samples"]
    rows = []
    for name, score in _scores(record):
        numbers = [score.accuracy, score.nll, score.calibration_error] if score else [None] * 3
        costs = [getattr(merges.get(name), field, None) for field in fields]
        if score or name in merges:
            rows.append([name, *numbers, *costs])
    return titles, rows
