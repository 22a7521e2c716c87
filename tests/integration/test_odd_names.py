"""Layers, clients and federations whose names hold slashes, spaces, brackets and other scripts."""

import json
from pathlib import Path

import pytest
import torch
import wandb
from helpers.federation import TinyClassifier, quiet_trainer, tiny_loader
from helpers.wandb_runs import open_run, read_runs
from safetensors.torch import load_file
from torch import nn

from lightning_fedfisher import ClientUpdate, FedFisherCallback
from lightning_fedfisher.cli.main import main
from lightning_fedfisher.results import FederationRecord
from lightning_fedfisher.secure_aggregation import (
    client_sums,
    divisors,
    from_fixed,
    to_fixed,
    update_from_sums,
)

KEYS = ["a", "a/b c", "größe:β[0]*", "<b>'%{x}|`"]


class OddlyNamed(TinyClassifier):
    """A small classifier with a layer under each of the names."""

    def __init__(self):
        super().__init__()
        self.network = self.network[:5]
        sizes = [16, *(6 for _ in KEYS)]
        layers = [nn.Linear(n, 6) for n in sizes[:-1]]
        self.heads = nn.ModuleDict(dict(zip(KEYS, layers, strict=True)))
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        x = self.network(x)
        for layer in self.heads.values():
            x = layer(x).tanh()
        return self.last(x)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two clients' updates, beside their W&B runs."""
    folder = tmp_path_factory.mktemp("x-rays") / "x-rays [2026] ü"
    folder.mkdir()
    with torch.random.fork_rng():
        for client in range(2):
            torch.manual_seed(client)
            name = f"hospital {client}/ü"
            logger = open_run(folder, name, federation="x-rays/2026 ü", log_model=True)
            callback = FedFisherCallback(
                folder / f"{client} ü[1].safetensors", curvature="diagonal"
            )
            trainer = quiet_trainer(folder, callbacks=[callback], logger=logger)
            trainer.fit(OddlyNamed(), tiny_loader(seed=client))
            wandb.finish()
    return sorted(map(str, folder.glob("*.safetensors")))


def test_w_and_b_has_every_layer_under_its_name(files):
    runs = read_runs(Path(files[0]).parent)
    assert {*runs} == {"hospital 0/ü", "hospital 1/ü"}
    for key in KEYS:
        assert runs["hospital 0/ü"].summary[f"fedfisher/trace/heads.{key}"] > 0


def test_every_command_takes_them(files, tmp_path, capsys):
    assert main(["inspect", "--json", files[0]]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [f"heads.{key}" for key in KEYS] == [layer["name"] for layer in told["layers"]][2:-1]
    assert main(["inspect", files[0]]) == 0
    assert "heads.größe:β[0]*" in capsys.readouterr().out
    assert main(["verify", *files]) == 0
    output = tmp_path / "größe [1].safetensors"
    assert main(["merge", *files, "--output", str(output), "--method", "fisher_merge"]) == 0
    assert {f"heads.{key}.weight" for key in KEYS} <= {*load_file(output)}
    record = output.with_suffix(".json")
    assert [c.name for c in FederationRecord.load(record).clients] == ["0 ü[1]", "1 ü[1]"]
    assert main(["report", str(record)]) == 0
    page = output.with_suffix(".html").read_text(encoding="utf-8")
    assert "größe" in page
    assert "<b>'" not in page


def test_sums_over_clients_keep_them_apart(files, tmp_path):
    updates = [ClientUpdate.open(file) for file in files]
    sums = [client_sums(update) for update in updates]
    fixed = [to_fixed(own, 2, divisors=divisors(own)) for own in sums]
    total = from_fixed({name: fixed[0][name] + fixed[1][name] for name in fixed[0]})
    found = update_from_sums(total, updates[0]).parameters
    output = tmp_path / "m.safetensors"
    assert main(["merge", *files, "--output", str(output), "--method", "fisher_merge"]) == 0
    torch.testing.assert_close(found, load_file(output), rtol=1e-4, atol=1e-5)
