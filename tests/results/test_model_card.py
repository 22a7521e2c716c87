from dataclasses import replace
from datetime import date

import pytest
import torch

from lightning_fedfisher.results.model_card import model_card

HOSTILE = "a`b|c\n# <b>"


def _cells(card, first):
    """The row of a table that begins with a cell."""
    (row,) = [line for line in card.splitlines() if line.startswith(f"| {first} |")]
    return row.strip("| ").split(" | ")


def test_a_card_tells_what_the_model_was_made_of(result, updates):
    card = model_card(result, "model.safetensors", ["fedfisher", "merge", "*.safetensors"])
    assert card.startswith("# model.safetensors\n")
    least = min(result.layers, key=lambda layer: layer.agreement)
    assert 0 < least.agreement < 1
    facts = {
        "method": "`fedfisher`, max_influence 5",
        "curvature": f"{result.curvature} {result.fisher} of a categorical likelihood",
        "model": f"{len(updates[0].layers)} layers, 265 weights",
        "model fingerprint": f"`{updates[0].model_fingerprint}`",
        "clients": "3",
        "samples": "90",
        "labels used": "0",
        "unlabelled samples used": "0",
        "least agreement in a layer": f"{least.agreement:.2f} (`{least.name}`)",
        "solved to": f"residual {result.history[-1]['residual']:.1e} in "
        f"{result.history[-1]['iterations']:.0f} iterations",
    }
    for name, told in facts.items():
        assert _cells(card, name) == [name, told]
    assert date.fromisoformat(_cells(card, "date")[1]) <= date.today()
    assert f"torch {torch.__version__}".split("+")[0] in _cells(card, "versions")[1]


def test_a_card_has_a_row_for_each_client(result, updates):
    card = model_card(result, "m", [])
    influence = result.influence.max(dim=0).values.tolist()
    shares = [client.weight for client in result.clients]
    assert sum(shares) == pytest.approx(1)
    for index, update in enumerate(updates):
        assert _cells(card, f"`client-{index}`") == [
            f"`client-{index}`",
            str(20 + 10 * index),
            f"{100 * shares[index]:.1f}%",
            f"{update.upload_bytes:,}",
            *(f"{times:.2g}" for times in influence[index]),
            f"`{update.digest[:16]}`",
        ]


def test_the_command_can_be_run_again(result):
    card = model_card(result, "m", ["fedfisher", "merge", "my files/*", "--method", "fedavg"])
    assert "```\nfedfisher merge 'my files/*' --method fedavg\n```" in card


def test_a_curvature_without_fisher_is_told_alone(result):
    card = model_card(replace(result, curvature="identity", fisher=""), "m", [])
    assert _cells(card, "curvature")[1] == "identity of a categorical likelihood"


def test_a_strangers_name_stays_in_its_cell(result):
    clients = (replace(result.clients[0], name=HOSTILE), *result.clients[1:])
    card = model_card(replace(result, clients=clients), "m", [])
    assert len(card.splitlines()) == len(model_card(result, "m", []).splitlines())
    assert len(_cells(card, "`a?b?c?# <b>`")) == len(_cells(card, "client"))


def test_a_strangers_words_stay_words(result):
    card = model_card(replace(result, fisher=HOSTILE), "m", [])
    assert rf"{result.curvature} a\`b\|c?\# \<b\> of" in card
    assert len(card.splitlines()) == len(model_card(result, "m", []).splitlines())


def test_a_command_with_a_strangers_file_stays_in_its_block(result):
    command = ["fedfisher", "merge", "a\n```\n# <script>\x1b[2J"]
    card = model_card(result, "m`*", command)
    assert card.startswith("# m\\`\\*\n")
    _, block, rest = card.split("\n````\n")
    assert block == "fedfisher merge 'a\n```\n# <script>\\x1b[2J'"
    assert rest.startswith("\n## Clients\n")
