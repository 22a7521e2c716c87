"""The model card: what a merged model was made of, for people, in Markdown."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime

from lightning_fedfisher._utils.environment import versions
from lightning_fedfisher._utils.text import markdown_block, markdown_code, markdown_text
from lightning_fedfisher.merge.result import MergeResult


def model_card(result: MergeResult, title: str, command: Sequence[str]) -> str:
    """Writes the card of a merged model.

    Args:
        result: The result of the merge.
        title: Name of the model's file.
        command: The command that merged it, in words.

    Returns:
        Markdown with the method, the command, versions, the clients with their sizes and what they
        weigh, and how far the solvers came.
    """
    weights = sum(rows * columns for rows, columns in (layer.shape for layer in result.layers))
    last, told = result.history[-1], " ".join((result.curvature, result.fisher)).strip()
    facts = [
        ("method", f"`{result.method}`, max_influence {result.max_influence:g}"),
        ("curvature", markdown_text(f"{told} of a {result.likelihood} likelihood")),
        ("model", f"{len(result.layers)} layers, {weights:,} weights"),
        ("model fingerprint", f"`{result.model_fingerprint}`"),
        ("clients", str(len(result.clients))),
        ("samples", f"{sum(client.num_samples for client in result.clients):,}"),
        ("labels used", str(result.server_labels)),
        ("unlabelled samples used", str(result.unlabelled_samples)),
        ("similarity of the clients", _rounded(result.similarity)),
        ("least agreement in a layer", _least_agreement(result)),
        ("solved to", f"residual {last['residual']:.1e} in {last['iterations']:.0f} iterations"),
        ("date", f"{datetime.now(UTC):%Y-%m-%d}"),
        ("versions", ", ".join(" ".join(pair) for pair in versions().items())),
    ]
    # The largest of a client's layers: where it decides most.
    influence = result.influence.amax(0).tolist()
    clients = [
        (
            markdown_code(client.name),
            f"{client.num_samples:,}",
            f"{100 * client.weight:.1f}%",
            f"{client.upload_bytes:,}",
            *(f"{times:.2g}" for times in row),
            markdown_code(client.digest[:16]),
        )
        for client, row in zip(result.clients, influence, strict=True)
    ]
    titles = ("client", "samples", "weight", "bytes", "information", "distance", "pull", "digest")
    return "\n".join(
        [
            f"# {markdown_text(title)}",
            "",
            "One model merged from clients that trained alone, in one round, without their data.",
            "",
            *_table(("", ""), facts),
            "",
            markdown_block(shlex.join(command)),
            "",
            "## Clients",
            "",
            "Information, distance of the weights from the median, and pull on the merge are "
            "multiples of the median client's, in the layer where they are largest.",
            "",
            *_table(titles, clients),
            "",
        ]
    )


def _least_agreement(result: MergeResult) -> str:
    known = [
        (layer.agreement, layer.name) for layer in result.layers if layer.agreement is not None
    ]
    if not known:
        return _rounded(None)
    least, name = min(known)
    return f"{_rounded(least)} ({markdown_code(name)})"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [titles, ["---"] * len(titles), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _rounded(number: float | None) -> str:
    return "not known" if number is None else f"{number:.2f}"
