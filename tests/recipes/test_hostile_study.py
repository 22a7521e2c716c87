"""The study of hostile clients end to end on embedded data, its forgeries and its table."""

import copy

import pytest
import torch
from simulation.federations import Federation
from simulation.rows import read_rows
from simulation.tables.studies import hostile_table
from studies import hostile_study
from studies.hostile_study import AIMED, ATTACKS, AVERAGES, BOUNDS, FLIPPED, NOBODY, Truth, variants

from lightning_fedfisher import merge_updates


@pytest.fixture
def study(monkeypatch, tmp_path):
    """Runs the study on one federation of few epochs, with two of the attacks."""
    federation = Federation("digits", "mlp", 10.0, 3, 0)
    monkeypatch.setattr(hostile_study, "FEDERATIONS", [federation])
    monkeypatch.setattr(hostile_study, "ATTACKS", ("mirror", "mimic"))
    hostile_study.main(["--output-dir", str(tmp_path)])
    path = tmp_path / "hostile_study.csv"
    before = path.read_text()
    hostile_study.main(["--output-dir", str(tmp_path)])
    assert path.read_text() == before
    return read_rows(path)


def test_study_writes_a_row_for_each_attack_and_merge(study):
    found = {(r["hostile"], r["attack"], r["merge"]): float(r["accuracy"]) for r in study}
    merges = [*BOUNDS, *AVERAGES]
    attacks = (NOBODY, "mirror", "mimic")
    assert list(found) == [(h, a, m) for h in ("1", "3") for a in attacks for m in merges]
    assert found["3", "mirror", "fedfisher, 2"] > found["3", "mirror", "fedfisher, no bound"]
    shown = hostile_table(study).splitlines()
    assert shown[0] == f"| network | hostile | attack | {' | '.join(merges)} |"
    assert shown[2].startswith(f"| mlp | 1 | none | {found['1', NOBODY, merges[0]]:.1f} |")
    assert len(shown) == 2 + 2 * len(attacks)


@pytest.fixture(scope="module")
def truth():
    samples, _ = hostile_study.digits()
    torch.manual_seed(0)
    initial = hostile_study.build_network("batchnorm")
    updates = []
    for client in range(5):
        own = samples.subset(range(60 * client, 60 * client + 60))
        network = hostile_study.train(initial, own, client, epochs=3)
        updates.append(hostile_study._update(network, own, f"client {client}"))
    merged = merge_updates(updates[:3], max_influence=10).state_dict
    return Truth(initial, updates[:3], merged, samples.subset(range(300)), updates[3:], 2)


@pytest.mark.parametrize("attack", ATTACKS)
def test_forgeries_are_valid_and_no_copies(attack, truth):
    for sent in variants(attack, truth):
        assert len(sent) == 2
        for update in sent:
            update.verify()
            assert update.model_fingerprint == truth.honest[0].model_fingerprint
        assert len({update.digest for update in [*truth.honest, *sent]}) == 5
    assert len(list(variants(AIMED, truth))) == 12
    assert len(list(variants(FLIPPED, truth))) == 1


def test_what_is_aimed_harms_more_than_noise_of_its_size(truth):
    change = hostile_study.aim(truth, 0.5)
    x, y = truth.samples.__getitems__(range(len(truth.samples)))

    def loss(offsets):
        network = copy.deepcopy(truth.initial).train()
        weights = {n: truth.merged[n] + 0.5 * t for n, t in offsets.items()}
        outputs = torch.func.functional_call(network, weights, (x,))
        return float(torch.nn.functional.cross_entropy(outputs, y))

    dice = torch.Generator().manual_seed(1)
    noise = {n: torch.randn(t.shape, generator=dice) for n, t in change.items()}
    noise = {n: t * change[n].norm() / t.norm() for n, t in noise.items()}
    assert loss(change) > loss(noise) + 1
