"""The study and the benchmark end to end on embedded data."""

import argparse
import math

import pytest
from benchmarks import extraction_benchmark
from simulation import study as shared
from simulation.federations import Federation
from simulation.rows import read_rows
from simulation.tables.benchmarks import benchmark_table
from simulation.tables.studies import study_table
from studies import curvature_study
from studies.curvature_study import Setting

FEDERATION = Federation("digits", "lenet", 1.0, 3, 0)
SETTINGS = [Setting("kfac", "normalised", "auto"), Setting("ekfac", "exact", "50")]


@pytest.fixture
def small(monkeypatch, few_digits):
    chosen = {"development": [FEDERATION]}
    monkeypatch.setattr(curvature_study, "CURVATURE_FEDERATIONS", chosen)
    monkeypatch.setattr("simulation.federations.CURVATURE_FEDERATIONS", chosen)
    monkeypatch.setattr(curvature_study, "SETTINGS", SETTINGS)
    monkeypatch.setattr(shared, "_EPOCHS", {"lenet": 1})


def _study(monkeypatch, output):
    monkeypatch.setattr("sys.argv", ["curvature_study.py", "--output-dir", str(output)])
    curvature_study.main()
    return output / "development.csv"


def test_study_writes_a_row_for_each_setting_and_goes_on(small, monkeypatch, tmp_path):
    table = _study(monkeypatch, tmp_path)
    whole = table.read_text()
    rows = read_rows(table)
    assert [row["curvature"] for row in rows] == ["kfac", "ekfac"]
    assert all(0 <= float(row["accuracy"]) <= 100 for row in rows)
    assert float(rows[0]["upload_bytes"]) > float(rows[0]["fedavg_bytes"])
    assert "| ekfac | exact | 50 |" in study_table(rows)
    # Interrupted before the last row: only that is done again, from the clients kept.
    table.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    monkeypatch.setattr(shared, "fit_client", None)
    again = read_rows(_study(monkeypatch, tmp_path))
    assert again[0] == rows[0]
    assert again[1]["accuracy"] == rows[1]["accuracy"]


def test_study_leaves_the_table_of_another_alone(small, monkeypatch, tmp_path):
    theirs = "# when and where\ndataset,model,method\n"
    (tmp_path / "development.csv").write_text(theirs)
    with pytest.raises(SystemExit, match=r"another study: choose another --output-dir"):
        _study(monkeypatch, tmp_path)
    assert (tmp_path / "development.csv").read_text() == theirs


def test_benchmark_measures_and_compares(small, tmp_path):
    flags = argparse.Namespace(
        model="lenet",
        samples=60,
        batch_size=30,
        repeats=1,
        data_dir=tmp_path,
        clients_dir=tmp_path,
        output=None,
    )
    report = extraction_benchmark.trained_client(flags)
    assert report["samples"] == 60
    ours = {name: row for name, row in report["rows"].items() if name.startswith("ours")}
    assert len(ours) == 5
    assert all(row["seconds"] > 0 for row in ours.values())
    assert set(report["relative_errors"]) == {"kfac", "diagonal", "ekfac"}
    assert all(error < 1e-3 for error in report["relative_errors"].values())
    assert all(math.isfinite(size) for size in report["peak_bytes_batch_250"].values())
    assert "| ours, exact K-FAC |" in benchmark_table(report)
