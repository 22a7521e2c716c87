"""The benchmark of real networks: its smallest network end to end, and the shapes of all."""

import json

import pytest
import torch
from benchmarks import real_models as benchmark
from simulation.model_costs import Setting, measure
from simulation.model_peers import PEERS, run_peer, supported
from simulation.real_models import REAL_MODELS, LSTMClassifier, UNet
from simulation.tables.benchmarks import real_models_table
from studies import tables
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher import extract_curvature

QUICK = ["--models", "lenet", "--samples", "40", "--batch-size", "8"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    output = tmp_path_factory.mktemp("real_models") / "report.json"
    benchmark.main([*QUICK, "--peers", "false", "--output", str(output)])
    return output


def test_a_client_and_the_server_are_measured(measured):
    row = json.loads(measured.read_text())["networks"]["lenet"]
    assert row["parameters"] == 44190
    assert row["layers"] == {"kronecker (hooks)": 5}
    assert row["curvature_samples"] == 40
    assert row["fedavg_bytes"] == 4 * 44190
    assert 0.5 * row["fedavg_bytes"] < row["upload_bytes"] <= row["fedavg_bytes"]
    extraction = row["rehearsal_seconds"] + row["extraction_seconds"]
    packing = row["rehearsal_packing_seconds"] + row["packing_seconds"]
    assert min(row["rehearsal_seconds"], row["extraction_seconds"], packing) > 0
    a_sample = row["training_seconds"]
    assert row["times_training"] == pytest.approx(extraction / 40 / a_sample)
    assert row["epochs"] == pytest.approx((extraction + packing) / (40 * a_sample))
    # At least the weights, and gradients and momentum beside them in training.
    assert row["peak_bytes"] > row["fedavg_bytes"]
    assert row["training"]["peak_bytes"] > 3 * row["fedavg_bytes"]
    for method in ("fedavg", "fedfisher"):
        took = row["merge"][method]
        assert took["seconds"] > 0
        assert took["solved"]
        assert took["residual"] < 1e-2


def test_a_later_run_keeps_what_it_does_not_measure(measured, monkeypatch):
    row = json.loads(measured.read_text())["networks"]["lenet"]
    fake = {"client": {**row, "epochs": -1.0, "training_seconds": 1.0}, "training": {}}
    del fake["client"]["merge"]
    monkeypatch.setattr(benchmark, "measure", lambda what, *rest: dict(fake[what]))
    skip = ["--peers", "false", "--merge", "false", "--output", str(measured)]
    before = measured.read_text()
    benchmark.main([*QUICK, *skip])
    after = json.loads(measured.read_text())["networks"]["lenet"]
    measured.write_text(before)
    assert after["merge"] == row["merge"]
    assert after["training_seconds"] == 1.0
    assert after["epochs"] > 0
    with pytest.raises(SystemExit, match="was measured with"):
        benchmark.main(["--models", "lenet", *skip])


def test_the_table_shows_numbers_and_failures(measured, capsys):
    report = json.loads(measured.read_text())
    row = report["networks"]["lenet"]
    row["peers"] = {"A": {"times_training": 1.5}, "B": {"failed": "no"}}
    report["networks"]["gone"] = {"failed": "ModuleNotFoundError:\n  - no gone"}
    lines = real_models_table(report).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| A | B | `fedavg`, s |" in lines[0]
    assert f"| lenet | {row['times_training']:.2f} | {row['epochs']:.3f} |" in lines[2]
    assert "| 1.50 | failed |" in lines[2]
    assert lines[3].startswith("| gone | failed: ModuleNotFoundError: - no gone |")
    tables.main([str(measured)])
    assert lines[2].split(" | ")[1] in capsys.readouterr().out


def test_what_cannot_be_measured_says_why(tmp_path):
    unknown = measure("client", Setting("nothing", 40, 8), tmp_path, 1)
    assert "KeyError: 'nothing'" in unknown["failed"]
    late = measure("client", Setting("lenet", 40, 8), tmp_path, 1e-5)
    assert late == {"failed": "took longer than 1e-05 minutes"}


def test_a_network_that_failed_takes_the_place_of_its_row(tmp_path, monkeypatch):
    output = tmp_path / "report.json"
    monkeypatch.setattr(benchmark, "measure", lambda *arguments: {"failed": "no timm"})
    benchmark.main([*QUICK, "--output", str(output)])
    assert json.loads(output.read_text())["networks"] == {"lenet": {"failed": "no timm"}}


def test_unknown_networks_are_refused():
    with pytest.raises(SystemExit, match="unknown models what: choose from lenet"):
        benchmark.main(["--models", "lenet,what"])


@pytest.mark.parametrize("name", ["lenet", "mobilenet_v3_small", "unet", "lstm"])
def test_networks_give_logits_for_their_labels(name):
    model = REAL_MODELS[name]
    network = model.load()().eval()
    x, y = model.draw(2, torch.Generator().manual_seed(0))
    logits = network(x)
    assert logits.shape[:1] + logits.shape[2:] == y.shape
    assert nn.functional.cross_entropy(logits, y).isfinite()


@pytest.mark.parametrize("name", ["minilm_lora", "gpt2_small", "llama_small", "distilbert"])
def test_networks_of_transformers_give_logits_for_their_labels(name):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    test_networks_give_logits_for_their_labels(name)


def test_every_layer_of_the_home_made_networks_gets_curvature():
    for network, name in ((UNet((2, 3, 4)), "unet"), (LSTMClassifier(), "lstm")):
        batch = REAL_MODELS[name].draw(2, torch.Generator().manual_seed(0))
        found = extract_curvature(network, [batch], progress=False)
        assert set(found.parameter_names) == {n for n, _ in network.named_parameters()}


def test_peers_are_given_the_layers_that_they_have():
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4), nn.Linear(4, 2)
    )
    network[3].weight.requires_grad_(False)
    assert list(supported(network)) == ["0"]


@pytest.mark.parametrize("name", PEERS)
def test_peers_run(name):
    pytest.importorskip("curvlinops" if "curvlinops" in name else "nngeometry")
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    data = TensorDataset(torch.randn(6, 3), torch.zeros(6, dtype=torch.long))
    seconds, covered = run_peer(name, network.eval(), DataLoader(data, 3))
    assert seconds > 0
    assert covered == pytest.approx((16 + 10) / (16 + 8 + 10))
