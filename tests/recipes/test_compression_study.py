"""The compression study end to end on embedded data, its truncation and its table."""

import pytest
import torch
from simulation import study as shared
from simulation.federations import Federation
from simulation.rows import read_rows
from simulation.tables.studies import compression_table
from studies import compression_study
from studies.compression_study import BUDGETS, PLAIN, PUBLISHED, truncated
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher import ClientUpdate, extract_curvature
from lightning_fedfisher.curvature.kronecker import Kronecker

FEDERATION = Federation("digits", "lenet", 1.0, 3, 0)


@pytest.fixture
def study(monkeypatch, tmp_path, few_digits):
    """Runs the study on a tiny federation."""
    monkeypatch.setattr(compression_study, "FEDERATIONS", {"development": [FEDERATION]})
    monkeypatch.setattr(compression_study, "BUDGETS", {"budget 0.5": 0.5})
    monkeypatch.setattr(shared, "_EPOCHS", {"lenet": 1})
    command = ["compression_study.py", "--output-dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)

    def run():
        compression_study.main()
        return tmp_path / "development.csv"

    return run


def test_study_writes_a_row_for_each_size_and_goes_on(study):
    table = study()
    whole = table.read_text()
    rows = read_rows(table)
    assert [row["sent"] for row in rows] == [PLAIN, "budget 0.5", PUBLISHED]
    plain, half, published = (float(row["upload"]) for row in rows)
    assert plain > 2
    assert half <= 0.5
    assert 0.8 < published <= 1.0
    assert all(float(row["packing_seconds"]) > 0 for row in rows)
    table.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    assert [row["sent"] for row in read_rows(study())] == [row["sent"] for row in rows]

    shown = compression_table(rows).splitlines()
    assert len(shown) == 5
    assert f"| {float(rows[0]['accuracy']):.1f} | +0.00 | +0.00 |" in shown[2]


@pytest.fixture
def tiny_update():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 9, bias=False), nn.ReLU(), nn.Linear(9, 6, bias=False))
        data = TensorDataset(torch.randn(60, 12), torch.randint(0, 6, (60,)))
    extracted = extract_curvature(model, DataLoader(data), max_samples=None, progress=False)
    return ClientUpdate.from_model(model, extracted.header(), extracted.blocks)


def test_budgets_are_those_of_the_curve():
    assert {0.3, 0.5, 0.75, 1.0, 1.5} <= set(BUDGETS.values())


def test_the_published_truncation_keeps_the_leading_triples(tiny_update):
    found, size = truncated(tiny_update)
    assert isinstance(found, ClientUpdate)
    weights = sum(tensor.numel() for tensor in tiny_update.parameters.values())
    assert size <= 4 * weights
    for name, block in tiny_update.blocks.items():
        assert isinstance(block, Kronecker)
        for part, before in block.tensors().items():
            after = found.blocks[name].tensors()[part]
            assert torch.equal(after, after.mT)
            values = torch.linalg.eigvalsh(before)
            error = torch.linalg.matrix_norm(after - before, 2)
            # The leading direction at least is there, to nine bits.
            assert error <= values[-2] + 0.05 * values[-1]
    for name, before in tiny_update.parameters.items():
        error = (found.parameters[name] - before).abs().max()
        assert 0 < error <= before.abs().max() * 2**-15
