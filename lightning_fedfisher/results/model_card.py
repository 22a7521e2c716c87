"""The model card: what a merged model was made of, for people, in Markdown."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime

from lightning_fedfisher._utils.environment import versions
from lightning_fedfisher._utils.text import client_names, markdown_code
from lightning_fedfisher.merge_module import FisherMergeModule


def model_card(merge: FisherMergeModule, title: str, command: Sequence[str]) -> str:
    """Writes the card of a merged model.

    Args:
        merge: after its fit.
        title: the name of the model's file.
        command: that merged it, in words.

    Returns:
        Markdown: method, command, versions, clients with their sizes and what they weigh, and how
        far the solvers came.
    """
    weights = sum(layer.shape[0] * layer.shape[1] for layer in merge.layers)
    last = merge.history[-1]
    header = merge.updates[0].header
    facts = [
        ("method", f"`{merge.method}`, max_influence {merge.max_influence:g}"),
        ("curvature", f"{header.curvature} {header.fisher} of a {header.likelihood} likelihood"),
        ("model", f"{len(merge.layers)} layers, {weights:,} weights"),
        ("model fingerprint", f"`{merge.updates[0].model_fingerprint}`"),
        ("clients", str(len(merge.updates))),
        ("samples", f"{sum(update.num_samples for update in merge.updates):,}"),
        ("labels used", str(merge.server_labels)),
        ("solved to", f"residual {last['residual']:.1e} in {last['iterations']:.0f} iterations"),
        ("date", f"{datetime.now(UTC):%Y-%m-%d}"),
        ("versions", ", ".join(" ".join(pair) for pair in versions().items())),
    ]
    # The largest of a client's layers: where it decides most.
    weighed = merge.influence.amax(0).tolist()
    names = client_names([update.source for update in merge.updates])
    clients = [
        (
            markdown_code(name),
            f"{update.num_samples:,}",
            f"{100 * share:.1f}%",
            f"{update.upload_bytes:,}",
            *(f"{times:.2g}" for times in row),
            markdown_code(update.digest[:16]),
        )
        for update, name, share, row in zip(
            merge.updates, names, merge.problems.shares, weighed, strict=True
        )
    ]
    titles = ("client", "samples", "share", "bytes", "information", "distance", "pull", "digest")
    return "\n".join(
        [
            f"# {title}",
            "",
            "One model merged from clients that trained alone, in one round, without their data.",
            "",
            *_table(("", ""), facts),
            "",
            "```",
            shlex.join(command),
            "```",
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


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [titles, ["---"] * len(titles), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
