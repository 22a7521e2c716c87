"""The comparison of devices, with the CPU on both sides."""

import json

import pytest
import torch
from benchmarks import gpu_check
from simulation.device_steps import CPU, DeviceSteps, relative_difference
from simulation.tables.benchmarks import gpu_table


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


SMALL = ["--models", "lenet", "--samples", "12", "--batch-size", "6", "--repeats", "1"]


def test_every_step_is_timed_and_compared(no_gpu, tmp_path, capsys):
    output = tmp_path / "check.json"
    gpu_check.main([*SMALL, "--output", str(output)])
    report = json.loads(output.read_text())
    assert report["device"] == "cpu"
    assert [row["step"] for row in report["rows"]] == ["callback", "extraction", "merge"]
    for row in report["rows"]:
        assert row["cpu_seconds"] > 0
        assert row["device_seconds"] > 0
        assert row["relative_difference"] < 1e-6
    printed = capsys.readouterr().out
    assert "No GPU was found" in printed
    assert gpu_table(report) in printed


def test_devices_that_differ_fail_the_check(no_gpu, monkeypatch):
    rows = [{"model": "lenet", "step": "merge", "cpu_seconds": 1.0, "device_seconds": 1.0}]
    for difference in (0.5, float("nan")):
        found = [{**rows[0], "relative_difference": difference}]
        monkeypatch.setattr(gpu_check, "check", lambda *arguments, found=found: found)
        with pytest.raises(SystemExit, match="error: the devices differ"):
            gpu_check.main(SMALL)


def test_what_is_compared_holds_every_layer_and_kind(tmp_path):
    steps = DeviceSteps("lenet", 4, 4, tmp_path)
    layers = {"conv1", "conv2", "fc1", "fc2", "fc3"}
    found = steps.extraction(CPU)
    assert set(found) == {
        f"{kind}/network.{layer}" for kind in ("kfac", "ekfac", "diagonal") for layer in layers
    }
    changed = {name: tensor * 1.01 for name, tensor in found.items()}
    assert relative_difference(found, changed) == pytest.approx(0.01, rel=1e-3)
    assert relative_difference(found, found) == 0
