"""Runs a simulated federation: every round of it, from the data to the merged model."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch.loggers import WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console
from torch import Tensor

from lightning_fedfisher import ClientUpdate
from lightning_fedfisher.results.record import FederationRecord
from lightning_fedfisher.tracking import log_federation, log_merged_model
from simulation.data import load_images
from simulation.environment import environment
from simulation.flags import Flags, settle
from simulation.initial_weights import read_initial_weights, without_prefix
from simulation.json_report import write_json
from simulation.record import record_round
from simulation.results import Report, report_of, show, whole_report, write
from simulation.round import (
    Merged,
    Round,
    headline,
    is_rank_zero,
    round_folder,
    say,
    seeded_network,
)

_WRITTEN = ("report.html", "merged.safetensors", "updates", "results.json", "record.json")


def run(flags: Flags) -> Report:
    """Simulates a federation and writes its results.

    Args:
        flags: from `parse_flags`.

    Returns:
        The content of ``results.json``.

    Raises:
        ValueError: if flags contradict each other, or the output folder holds another federation.
    """
    if flags.resume and flags.output_dir is None:
        raise ValueError("--resume goes on in a folder: add --output-dir")
    if flags.new_head and flags.init is None:
        raise ValueError("--new-head leaves out a part of given weights: add --init")
    counts = ("clients", "rounds", "epochs", "max_train_samples", "batch_size", "curvature_samples")
    for name in counts:
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    images = load_images(flags.dataset, flags.data_dir)
    flags = settle(flags, images)
    say(f"data: {images.note}")
    subset = f"{flags.max_train_samples or len(images.train)} of {len(images.train)}"
    say(
        f"{flags.clients} clients share {subset} training samples of {flags.dataset} "
        f"(alpha {flags.alpha:g}, partition seed {flags.partition_seed}); model {flags.model}"
    )
    _refuse_finished_clients(flags)
    weights = None
    if flags.init is not None:
        weights = read_initial_weights(flags.init, seeded_network(flags, images), flags.new_head)
        head = ", with a new last layer" if flags.new_head else ""
        say(f"all clients start from {flags.init}{head}")
    several = flags.rounds > 1
    reports: list[Report] = []
    for number in range(1, flags.rounds + 1):
        current = Round(flags, images, number, weights)
        finished = current.finished() if flags.resume and several else None
        if several:
            source = f", from the model of {headline(flags.methods)}" if number > 1 else ""
            kept = " (kept)" if finished else ""
            say(f"round {number} of {flags.rounds}{source}{kept}")
        results, weights = finished or play(current)
        reports.append(results)
        if is_rank_zero():
            if several:
                write_json(round_folder(flags, 1) / "results.json", whole_report(flags, reports))
            after = f"after round {number} of {flags.rounds}" if several else "of one-shot models"
            show(results, Console(), f"Test accuracy {after}")
    say(
        "accuracy and calibration error (ECE) in percent; upload: bytes a client sends, in\n"
        "multiples of its weights; client: extraction; server: merge; labels: labelled samples\n"
        "the server used\n"
        "written:"
    )
    later = [round_folder(flags, number) for number in range(2, flags.rounds + 1)]
    for path in (*(round_folder(flags, 1) / name for name in _WRITTEN), *later):
        say(f"  {path}")
    return whole_report(flags, reports)


def play(current: Round) -> tuple[Report, dict[str, Tensor]]:
    """Trains the clients of one round, merges their updates, and writes the results.

    Args:
        current: the round.

    Returns:
        The numbers of the round, and the weights that the next one starts from.
    """
    clients, predictions = current.fit_clients()
    methods = current.flags.methods
    main_method = headline(methods)
    merged: dict[str, Merged] = {}
    # The main method comes last: its W&B run shows the others beside it.
    for method in sorted(methods, key=lambda method: method == main_method):
        with current.server_logger(method) as logger:
            merged[method] = current.merge(method, logger)
            if method == main_method:
                where = environment(current.device)
                record = record_round(current, clients, predictions, merged, main_method, where)
                results = report_of(record, methods, current.images.note)
                state = merged[method].result.state_dict
                _publish(current, results, record, state, logger)
    return results, without_prefix(state)


@rank_zero_only
def _publish(
    current: Round,
    results: Report,
    record: FederationRecord,
    state: Mapping[str, Tensor],
    logger: WandbLogger | None,
) -> None:
    """Writes the results of a round, and logs them to the run of its main method."""
    write(current.output, results, record, state)
    if logger:
        method = record.merges[0].method
        updates = [ClientUpdate.open(folder.update(method)) for folder in current.folders]
        log_federation(logger, record)
        log_merged_model(logger, current.model_file, updates)


def _refuse_finished_clients(flags: Flags) -> None:
    """Refuses folders of other federations, for all rounds at once and before any training."""
    for number in range(1, flags.rounds + 1):
        folder = round_folder(flags, number)
        if not flags.resume and is_rank_zero() and (folder / "clients").exists():
            raise ValueError(
                f"{folder} already holds finished clients: add --resume to keep them, or "
                "choose another --output-dir"
            )
