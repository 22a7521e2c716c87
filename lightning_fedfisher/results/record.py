"""FederationRecord: what is known of a federation afterwards, for tables, charts and pages.

Plain numbers in one JSON file, whoever gathered them: no tensors, no figures, no logger. What was
not measured is None or empty, and charts of it are left out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from lightning_fedfisher._utils.files import atomic_write
from lightning_fedfisher.curvature.summary import CurvatureSummary

FILE_NAME = "record.json"
"""What a record is called in the folder of a federation."""

LayerCurvature = CurvatureSummary
"""What a record holds of a client's curvature of one layer."""

_SCHEMA: Literal[1] = 1
_TOLD = 5  # things that are wrong with a file


@dataclass(frozen=True)
class ModelScore:
    """How good a model is on test data.

    Attributes:
        accuracy: percent.
        nll: mean negative log-likelihood, in nats.
        calibration_error: expected calibration error (15 bins, L1), percent.
        confusion: samples by true class (rows) and predicted class (columns); empty if not counted.
    """

    accuracy: float
    nll: float
    calibration_error: float
    confusion: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class ClientRecord:
    """One client.

    Attributes:
        name: its name.
        num_samples: training samples it holds.
        class_counts: of those, samples of each class; empty if it does not tell.
        train_loss: its training loss after each epoch.
        extraction_seconds: wall-clock time of extracting the curvature.
        upload_bytes: size of its update file.
        curvature: by layer, as it was sent.
        score: its own model's; None if it was not tested.
    """

    name: str
    num_samples: int
    class_counts: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    extraction_seconds: float | None = None
    upload_bytes: int | None = None
    curvature: list[LayerCurvature] = field(default_factory=list)
    score: ModelScore | None = None


@dataclass(frozen=True)
class MergeRecord:
    """What one method made of the clients' updates.

    Attributes:
        method: its name.
        history: sweep by sweep, iterations, objective and residual (`FisherMergeModule.history`).
        layers: names, in the order of the rows below.
        distances: of each layer (rows) and client, the distance ``<W - W_k, F_k (W - W_k)>^(1/2)``
            from the merged weights ``W`` in the client's own Fisher norm.
        influence: of each layer and client, the largest of its information, distance and pull, as
            a multiple of the median client's.
        upload_bytes: mean size of the updates it merges.
        fedavg_bytes: of the weights alone, what FedAvg sends.
        client_seconds: mean time of a client's extraction.
        server_seconds: time of the merge.
        server_labels: labelled samples the server used.
        score: the merged model's; None if it was not tested.
    """

    method: str
    history: list[dict[str, float]]
    layers: list[str] = field(default_factory=list)
    distances: list[list[float]] = field(default_factory=list)
    influence: list[list[float]] = field(default_factory=list)
    upload_bytes: int | None = None
    fedavg_bytes: int | None = None
    client_seconds: float | None = None
    server_seconds: float | None = None
    server_labels: int = 0
    score: ModelScore | None = None


@dataclass(frozen=True)
class FederationRecord:
    """A federation: its clients, its merges, and what they are compared with.

    Attributes:
        title: what it is, in a few words.
        clients: all of them.
        merges: all of them, the one that matters first.
        best_client: score of the best single client's model; None if none was tested.
        ensemble: score of all clients' models together; None if it was not tested.
        config: flags it ran with.
        environment: date, versions and hardware.
    """

    title: str
    clients: list[ClientRecord]
    merges: list[MergeRecord]
    best_client: ModelScore | None = None
    ensemble: ModelScore | None = None
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the record; a reader sees the old file or the whole new one.

        Args:
            path: of the JSON file.
        """
        with atomic_write(Path(path)) as partial:
            partial.write_bytes(_adapter().dump_json(_Saved(_SCHEMA, self), indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FederationRecord:
        """Reads a record.

        Args:
            path: of the JSON file, or of the folder with a ``record.json``.

        Returns:
            The record.

        Raises:
            ValueError: if the file is not a record, with what is wrong.
            OSError: if it cannot be read.
        """
        file = Path(path)
        file = file / FILE_NAME if file.is_dir() else file
        try:
            saved = _adapter().validate_json(file.read_bytes())
        except ValidationError as error:
            wrong = [
                f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()
            ]
            more = [f"and {len(wrong) - _TOLD} more"] if len(wrong) > _TOLD else []
            told = "; ".join(wrong[:_TOLD] + more)
            raise ValueError(f"{file} is not the record of a federation: {told}") from error
        return saved.federation


@with_config(ConfigDict(ser_json_inf_nan="constants", extra="forbid"))
@dataclass(frozen=True)
class _Saved:
    """What a file holds."""

    schema: Literal[1]
    federation: FederationRecord


@cache
def _adapter() -> TypeAdapter[_Saved]:
    return TypeAdapter(_Saved)
