"""The study of hostile clients end to end on embedded data, its forgeries and its table."""

import math

import pytest
import torch
from simulation import study as shared
from simulation.federations import Federation
from simulation.rows import read_rows
from simulation.tables.studies import hostile_table
from studies import hostile_study
from studies.hostile_study import ATTACKS, BOUNDS, NOBODY, SHREWD, forge
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher import ClientUpdate, extract_curvature


@pytest.fixture
def study(monkeypatch, tmp_path):
    """Runs the study on a tiny federation."""
    federation = Federation("digits", "lenet", 1.0, 3, 0)
    monkeypatch.setattr(hostile_study, "FEDERATIONS", {"development": [federation]})
    monkeypatch.setattr(hostile_study, "BOUNDS", {"none": math.inf, "2": 2.0})
    monkeypatch.setattr(shared, "_EPOCHS", {"lenet": 6})
    monkeypatch.setattr("sys.argv", ["hostile_study.py", "--output-dir", str(tmp_path)])
    hostile_study.main()
    return read_rows(tmp_path / "development.csv")


def test_study_writes_a_row_for_each_attack_and_bound(study):
    found = {(row["attack"], row["bound"]): float(row["accuracy"]) for row in study}
    attacks = (NOBODY, *ATTACKS, SHREWD)
    assert list(found) == [(attack, bound) for attack in attacks for bound in ("none", "2")]
    assert found["noise for weights", "2"] > found["noise for weights", "none"] + 10
    shown = hostile_table(study).splitlines()
    assert shown[0] == "| forged | lenet: no bound | lenet: 2 |"
    assert shown[2] == f"| none | {found['none', 'none']:.1f} | {found['none', '2']:.1f} |"
    assert len(shown) == 2 + len(attacks)


@pytest.fixture
def updates():
    made = []
    for seed in range(3):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 3))
            data = TensorDataset(torch.randn(30, 5), torch.randint(0, 3, (30,)))
        found = extract_curvature(model, DataLoader(data), max_samples=None, progress=False)
        made.append(ClientUpdate.from_model(model, found.header(), found.blocks))
    return made


@pytest.mark.parametrize("attack", [*ATTACKS, SHREWD])
def test_forgeries_are_valid_updates_and_not_the_first(attack, updates):
    forged = forge(updates, attack, 2.0)
    forged.verify()
    assert forged.model_fingerprint == updates[0].model_fingerprint
    assert forged.digest != updates[0].digest


def test_who_knows_the_bound_stays_just_within_it(updates):
    forged = forge(updates, SHREWD, 2.0)
    for name, tensor in forged.parameters.items():
        honest = torch.stack([update.parameters[name] for update in updates])
        middle = honest.median(dim=0).values
        torch.testing.assert_close(tensor - middle, -2 * (honest[0] - middle))
    for name, block in forged.blocks.items():
        torch.testing.assert_close(block.trace(), 4 * updates[0].blocks[name].trace())


def test_the_bounds_are_none_and_tighter_ones():
    assert list(BOUNDS.values()) == sorted(BOUNDS.values(), reverse=True)
    assert BOUNDS["none"] == math.inf
