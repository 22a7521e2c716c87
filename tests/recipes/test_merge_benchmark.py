"""The server's benchmark end to end, on few and small updates."""

import json

import pytest
import torch
from benchmarks import merge_benchmark
from simulation import study as shared
from simulation.federations import Federation
from simulation.synthetic import perturbed, synthetic_update, write_perturbed
from simulation.tables.benchmarks import merge_benchmark_table

FEDERATION = Federation("digits", "lenet", 1.0, 3, 0)


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "simulation.federations.CURVATURE_FEDERATIONS", {"development": [FEDERATION]}
    )
    monkeypatch.setattr(shared, "_EPOCHS", {"lenet": 1})
    monkeypatch.setattr("simulation.clients._LABELLED_SAMPLES", 20)
    # More threads than free cores make small eigenproblems many times slower.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def measure(*arguments):
        output = tmp_path / "report.json"
        places = ["--output-dir", str(tmp_path / "out"), "--output", str(output)]
        merge_benchmark.main([*places, "--model", "lenet", "--repeats", "1", *arguments])
        report = json.loads(output.read_text())
        assert set(report["environment"]) >= {"date", "hardware"}
        return report

    return measure


def test_speed_compares_with_the_published_server(run, few_published_steps, tmp_path):
    report = run("--what", "speed", "--clients-dir", str(tmp_path / "clients"))
    assert [row["labels"] for row in report["rows"].values()] == [0, 20, 0]
    assert all(0 <= row["accuracy"] <= 100 for row in report["rows"].values())
    assert report["times_faster"] > 0
    assert "| fedfisher_kfac |" in merge_benchmark_table(report)


def test_clients_are_merged_in_processes_of_their_own(run, tmp_path):
    report = run("--what", "resnet18", "--clients", "2")
    (row,) = report["rows"].values()
    assert row["clients"] == 2
    assert 0 < row["before_bytes"] <= row["peak_bytes"]
    assert 0 < row["fit_seconds"] <= row["seconds"]
    assert not (tmp_path / "out" / "resnet18-lenet").exists()
    assert merge_benchmark_table(report).startswith("| clients | seconds |")


def test_processes_agree(run):
    report = run("--what", "processes", "--clients", "2")
    assert list(report["rows"]) == ["1", "2"]
    assert report["relative_difference"] < 1e-4
    assert merge_benchmark_table(report).count("\n") == 3


def test_uploads_are_packed_opened_and_read(run):
    report = run("--what", "upload")
    plain, *packed = (row["uploads"] for row in report["rows"].values())
    assert plain > 2 > 1 >= packed[0] > packed[1]
    for row in report["rows"].values():
        assert all(row[f"{what}_seconds"] > 0 for what in ("packing", "verifying", "reading"))
    assert merge_benchmark_table(report).startswith("| sent | FedAvg uploads |")


def test_numbers_of_clients_are_compared(run, monkeypatch, tmp_path):
    names = ("seconds", "fit_seconds", "cpu_seconds", "before_bytes", "peak_bytes")
    took = dict.fromkeys(names, 1.0)
    monkeypatch.setattr(
        merge_benchmark,
        "measure_merge",
        lambda folder, count: ({**took, "clients": count, "iterations": 1.0}, {}),
    )
    report = run("--what", "clients", "--clients", "8", "--clients-dir", str(tmp_path / "clients"))
    assert report["clients_ratios"] == [2.0, 2.0]
    assert len(list((tmp_path / "out" / "clients-lenet").glob("client-*"))) == 8


def test_perturbed_updates_differ_and_keep_their_curvature_positive(tmp_path):
    update = synthetic_update(merge_benchmark.untrained("lenet"), torch.rand(2, 1, 28, 28))
    other = perturbed(update, 1)
    for layer in update.layers:
        assert not torch.equal(other.weights(layer), update.weights(layer))
        for factor in other.block(layer).tensors().values():
            assert torch.equal(factor, factor.mT)
            values = torch.linalg.eigvalsh(factor.double())
            assert values.min() > -1e-6 * values.max()
    write_perturbed(lambda: update, tmp_path, 2)
    kept = (tmp_path / "client-0001.safetensors").stat().st_mtime_ns
    paths = write_perturbed(lambda: update, tmp_path, 3)
    assert len(paths) == 3
    assert paths[1].stat().st_mtime_ns == kept


def test_too_small_a_disk_is_refused(monkeypatch, tmp_path):
    update = synthetic_update(merge_benchmark.untrained("lenet"), torch.rand(2, 1, 28, 28))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 0}))
    with pytest.raises(OSError, match="room"):
        write_perturbed(lambda: update, tmp_path, 3)
