"""``fedfisher inspect``, run as a user runs it but for the process."""

import json

import pytest
import torch
from helpers.federation import tiny_updates
from helpers.small_updates import header_of
from safetensors.torch import load_file
from torch import nn

from lightning_fedfisher import ClientUpdate
from lightning_fedfisher.cli.main import main
from lightning_fedfisher.layers import Layer


def test_inspect_tells_every_layer(folder, capsys):
    assert main(["inspect", "updates/client-3.safetensors"]) == 0
    told = capsys.readouterr().out
    update = ClientUpdate.open("updates/client-3.safetensors")
    for layer in update.layers:
        assert layer.name in told
    for part in ("50 samples", "kfac", "kronecker", "4x28", update.digest, "of a FedAvg upload"):
        assert part in told


@pytest.mark.parametrize("budget", [None, 8.0])
def test_inspect_as_json_adds_up(folder, capsys, budget, monkeypatch):
    monkeypatch.setattr("lightning_fedfisher.update.upload_budget._SMALLEST_BUDGET", 0)
    (source,) = tiny_updates(folder, clients=1, epochs=1, upload_budget=None)
    update = source if budget is None else source.compressed(budget)
    path = update.save("one.safetensors")
    assert main(["inspect", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == path.stat().st_size == update.upload_bytes
    assert told["digest"] == update.digest == ClientUpdate.open(path).digest
    assert told["model"] == update.model_fingerprint
    parts = [layer[part] for layer in told["layers"] for part in ("weights", "curvature")]
    sent = sum(tensor.nbytes for tensor in load_file(path).values())
    assert sum(part["bytes"] for part in parts) == sent
    assert all(0 < part["bits"] <= 32 for part in parts)
    assert (max(part["bits"] for part in parts) == 32) == (budget is None)


def test_a_table_is_as_wide_as_a_screen_whatever_a_layer_is_called(folder, capsys):
    names = [f"{'n' * 900}{index}" for index in range(500)]
    layers = tuple(Layer(name, ((f"{index}.w", (1, 1)),)) for index, name in enumerate(names))
    header = header_of(nn.Linear(1, 1), layers=layers, kinds=dict.fromkeys(names, "identity"))
    tensors = {f"parameters/{index}.w": torch.ones(1, 1) for index in range(500)}
    path = ClientUpdate(header, tensors).save(folder / "long.safetensors")
    assert main(["inspect", str(path)]) == 0
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) < 200
    assert "nnn499" in told
    assert main(["inspect", str(path), "--json"]) == 0
    assert [layer["name"] for layer in json.loads(capsys.readouterr().out)["layers"]] == names


def test_a_stranger_writes_nothing_on_the_terminal(folder, capsys):
    (update,) = tiny_updates(folder, clients=1, epochs=1, metadata={"who": "\x1b[2J\x07 é"})
    update.save("odd.safetensors")
    assert main(["inspect", "odd.safetensors"]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert r"who: \x1b[2J\x07 é" in told
