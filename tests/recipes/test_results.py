"""The figures in the READMEs are those of the recorded results."""

import json
from pathlib import Path

import pytest
from results_table import costs_table, results_table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "recipes" / "results"


def load(*names):
    return [json.loads((RESULTS / f"{name}.json").read_text()) for name in names]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_recorded_results_tell_date_and_hardware(path):
    report = json.loads(path.read_text())
    assert set(report["environment"]) == {"date", "hardware", "python", "torch", "lightning"}
    assert path.stem in (ROOT / "recipes" / "README.md").read_text()


def test_readme_shows_the_recorded_accuracies():
    cells = load("fashionmnist-lenet-a0.1-p3-s0", "fashionmnist-lenet-a0.07-p11-s7", "cifar10-cnn")
    table = results_table(cells)
    assert table in (ROOT / "README.md").read_text()


def test_recipes_readme_shows_every_recorded_table():
    text = (ROOT / "recipes" / "README.md").read_text()
    seeds = load(*(f"fashionmnist-lenet-a0.1-p3-s{seed}" for seed in range(3)))
    assert results_table(seeds, mean=True) in text
    for name in ("fashionmnist-lenet-a0.1-p3-s0", "cifar10-cnn", "cifar10-resnet18"):
        assert costs_table(*load(name)) in text
