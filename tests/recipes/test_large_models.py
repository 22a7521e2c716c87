import json

import pytest
import torch
from benchmarks import large_models
from simulation.tables.benchmarks import large_models_table

from lightning_fedfisher import plan_update

SMALL = ["--width", "8", "--hidden", "16", "--vocabulary", "32", "--samples", "12", "--models"]
SMALL += ["tiny", "--batch-size", "6", "--memory-budget", "100"]


def test_layers_are_measured_beside_their_plan(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(large_models, "MODELS", {"tiny": (2, 8, 16)})
    output = tmp_path / "large.json"
    large_models.main([*SMALL, "--output", str(output)])
    report = json.loads(output.read_text())
    assert report["plans"]["tiny"].keys() == {"kfac", "input_gram", "diagonal"}
    assert report["plans"]["tiny"]["kfac"]["largest_factor"] == 32
    assert report["plans"]["tiny"]["input_gram"]["largest_factor"] == 16
    for kind, found in report["measured"].items():
        for part in ("extraction", "merge"):
            assert found[part]["seconds"] > 0
            assert found[part]["planned_bytes"] > 0
        assert found["merge"]["solved"]
        planned = found["file"]["planned_bytes"]
        assert planned < found["file"]["bytes"] < planned + 10_000
        assert report["estimates"]["tiny"][kind]["merge_seconds"] > 0
    assert large_models_table(report) in capsys.readouterr().out
    assert str(tmp_path) not in output.read_text()


def test_the_work_of_a_model_is_that_of_its_layers():
    with torch.device("meta"):
        layers = [large_models.part_of_block(8, 16) for _ in range(2)]
        both = torch.nn.Sequential(*layers)
    for kind in large_models.METHODS:
        one, two = (plan_update(model, kind) for model in (layers[0], both))
        for work in (large_models.merge_work, large_models.extraction_work):
            assert work(two) == 2 * work(one)
    one = plan_update(layers[0], "input_gram", clients=3)
    decomposed, multiplied = 2 * 8**3 + 16**3, 3 * (8 * 8**2 + 16 * 8**2 + 8 * 16**2)
    assert large_models.merge_work(one) == decomposed + multiplied


def test_a_billion_weights_are_what_they_are_called():
    for name, weights in (("1B", 1.2e9), ("7B", 6.7e9)):
        with torch.device("meta"):
            model = large_models.llama(*large_models.MODELS[name], 32000)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(weights, rel=0.02)


def test_clients_share_their_initial_weights():
    first, second = (large_models.trained_part(8, 16, client) for client in range(2))
    difference = (first[0].weight - second[0].weight).detach().norm() / first[0].weight.norm()
    assert 0.05 < difference < 0.3
