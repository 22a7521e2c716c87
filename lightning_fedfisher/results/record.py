"""FederationRecord: what is known about a federation afterwards, for tables, charts and pages.

It holds plain numbers, in one JSON file: no tensors, no figures, no logger. What was not measured
is None or empty, and reports leave it out. Writing a record needs the standard library alone;
reading one needs pydantic, which checks it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning_fedfisher._utils.files import atomic_write
from lightning_fedfisher._utils.text import terminal_text
from lightning_fedfisher.curvature.summary import CurvatureSummary

FILE_NAME = "record.json"
"""The name of a record's file in the folder of a federation."""

_SCHEMA: Literal[1] = 1
_MOST_PROBLEMS = 5  # of a file that a refusal lists


@dataclass(frozen=True)
class ModelScore:
    """How good a model is on test data.

    Attributes:
        accuracy: Share of samples that are classified correctly, in percent.
        nll: Mean negative log-likelihood, in nats.
        calibration_error: Expected calibration error (15 bins, L1), in percent.
        confusion: Number of samples by true class (rows) and predicted class (columns); empty if
            they were not counted.

    Example:
        >>> ModelScore(accuracy=75.0, nll=0.7, calibration_error=3.1, confusion=[[2, 1], [0, 1]])
        ModelScore(accuracy=75.0, nll=0.7, calibration_error=3.1, confusion=[[2, 1], [0, 1]])
    """

    accuracy: float
    nll: float
    calibration_error: float
    confusion: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class ClientRecord:
    """What is known about one client.

    Attributes:
        name: The client's name.
        num_samples: How many training samples it holds.
        class_counts: How many of them are of each class; empty if it does not tell.
        train_loss: Its mean training loss after each epoch.
        extraction_seconds: How long the extraction of its curvature took, in seconds.
        upload_bytes: The size of its update file, in bytes.
        curvature: A summary of each layer's curvature, as it was sent.
        score: How good the client's own model is; None if it was not tested.

    Example:
        >>> ClientRecord("ward-3", num_samples=120, class_counts=[100, 20]).upload_bytes is None
        True
    """

    name: str
    num_samples: int
    class_counts: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    extraction_seconds: float | None = None
    upload_bytes: int | None = None
    curvature: list[CurvatureSummary] = field(default_factory=list)
    score: ModelScore | None = None


@dataclass(frozen=True)
class MergeRecord:
    """How one method merged the clients' updates, and what it cost.

    Attributes:
        method: The method's name.
        history: For each epoch of the merge, its ``iterations``, ``objective`` and ``residual``.
        layers: The layers' names, in the order of the rows of `distances` and `influence`.
        distances: For each layer (rows) and client (columns), the distance
            ``<W - W_k, F_k (W - W_k)>^(1/2)`` of the merged weights ``W`` in the client's own
            Fisher norm.
        influence: For each layer (rows) and client (columns), the largest of the client's
            information, distance and pull, as a multiple of the median client's.
        upload_bytes: The mean size of the updates, in bytes.
        fedavg_bytes: The size of the weights alone, which is what FedAvg sends, in bytes.
        client_seconds: The mean time of a client's extraction, in seconds.
        server_seconds: The time of the merge, in seconds.
        server_labels: How many labelled samples the server used.
        score: How good the merged model is; None if it was not tested.
        unlabelled_samples: How many samples without labels the server used.
        similarity: How alike the clients' layers compute, at most 1; None if it is not known.

    Example:
        >>> merge = MergeRecord("fedavg", [{"iterations": 0, "objective": 0, "residual": 0}])
        >>> merge.server_labels
        0
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
    unlabelled_samples: int = 0
    similarity: float | None = None


@dataclass(frozen=True)
class FederationRecord:
    """A federation: its clients, its merges, and what they are compared with.

    Attributes:
        title: A few words that say which federation this is.
        clients: One record for each client.
        merges: One record for each method that was tried, the one that matters first.
        best_client: The score of the best single client's model; None if none was tested.
        ensemble: The score of all clients' models together; None if it was not tested.
        config: The settings that it ran with. `save` needs values that JSON can hold.
        environment: Date, versions and hardware.

    Example:
        >>> import tempfile
        >>> record = FederationRecord("two clinics", clients=[ClientRecord("a", 9)], merges=[])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     record.save(f"{folder}/record.json")
        ...     FederationRecord.load(folder) == record
        True
    """

    title: str
    clients: list[ClientRecord]
    merges: list[MergeRecord]
    best_client: ModelScore | None = None
    ensemble: ModelScore | None = None
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the record to a JSON file; a reader sees the old file or the whole new one.

        Args:
            path: The file to write, usually ``record.json``; missing folders are made.

        Raises:
            ValueError: If `config` holds what JSON cannot.
            OSError: If the file cannot be written.
        """
        saved = asdict(_Saved(_SCHEMA, self))
        text = json.dumps(saved, indent=1, ensure_ascii=False, default=_to_json)
        with atomic_write(Path(path)) as partial:
            # The names of files may hold lone surrogates, which UTF-8 cannot encode.
            partial.write_bytes(text.encode(errors="replace"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FederationRecord:
        """Reads a record and checks every field of it.

        Args:
            path: The JSON file, or the folder with a ``record.json``.

        Returns:
            The record, equal to the one that was saved.

        Raises:
            ValueError: If the file is not a record; the message names what is wrong with it.
            OSError: If the file cannot be read.
            ImportError: If pydantic is not installed.
        """
        try:
            from pydantic import TypeAdapter, ValidationError
        except ImportError as error:
            raise ImportError(
                "reading a record needs pydantic: pip install 'lightning-fedfisher[report]'"
            ) from error
        file = Path(path)
        file = file / FILE_NAME if file.is_dir() else file
        try:
            saved = TypeAdapter(_Saved).validate_json(file.read_bytes())
        except ValidationError as error:
            wrong = [
                f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()
            ]
            hidden = len(wrong) - _MOST_PROBLEMS
            more = [f"and {hidden} more"] if hidden > 0 else []
            told = "; ".join(wrong[:_MOST_PROBLEMS] + more)
            told = f"{file} is not the record of a federation: {told}"
            raise ValueError(terminal_text(told)) from error
        return saved.federation


@dataclass(frozen=True)
class _Saved:
    """The content of a file: the version of its form, and the record."""

    # What `pydantic.with_config` would set, without importing it.
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    schema: Literal[1]
    federation: FederationRecord


def _to_json(value: Any) -> str:
    """Writes a path as text, and refuses what JSON cannot hold."""
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    raise ValueError(f"cannot serialize a {type(value).__name__} in the config of a record")
