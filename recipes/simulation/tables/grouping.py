"""Groups the rows of a study by federation, and federations into the columns of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class FederationKey(NamedTuple):
    """The columns of a study's CSV file that tell its federations apart."""

    dataset: str
    model: str
    alpha: str
    partition_seed: str
    seed: str


def short_name(row: dict[str, str]) -> str:
    """Names a federation by its network, its alpha and its partition seed.

    Args:
        row: of a study.

    Returns:
        Text such as ``lenet a0.1 p3``.
    """
    return f"{row['model']} a{row['alpha']} p{row['partition_seed']}"


def federation_key(row: dict[str, str]) -> FederationKey:
    """Tells which federation a row is about.

    Args:
        row: of a study.

    Returns:
        The columns that tell federations apart.
    """
    return FederationKey(*(row[column] for column in FederationKey._fields))


def by_federation(
    rows: Sequence[dict[str, str]], column: str
) -> dict[str, dict[FederationKey, dict[str, str]]]:
    """Sorts the rows of a study by one of its columns, and then by federation.

    Args:
        rows: of a study.
        column: name of the column, for example ``method``.

    Returns:
        For each value of the column the row of each federation.
    """
    found: dict[str, dict[FederationKey, dict[str, str]]] = {}
    for row in rows:
        found.setdefault(row[column], {})[federation_key(row)] = row
    return found


def columns_of(rows: Sequence[dict[str, str]]) -> dict[str, list[FederationKey]]:
    """Sorts federations into the columns of a table: LeNet's by alpha, others by network.

    Args:
        rows: of a study.

    Returns:
        The federations of each column, by the column's title.
    """
    keys = sorted(
        dict.fromkeys(map(federation_key, rows)),
        key=lambda key: (key.model != "lenet", key.model, float(key.alpha)),
    )
    columns: dict[str, list[FederationKey]] = {}
    for key in keys:
        title = f"lenet a{key.alpha}" if key.model == "lenet" else key.model
        columns.setdefault(title, []).append(key)
    return columns
