"""The comparison of devices, with the CPU on both sides."""

import json
import math

import pytest
import torch
import torchvision
from benchmarks import gpu_check
from simulation.device_costs import STEPS, DeviceCosts, exact_convolutions
from simulation.device_steps import CPU, DeviceSteps, relative_difference, worst
from simulation.memory import peak_device_memory
from simulation.real_models import LARGE_MODELS, Logits, RealModel
from simulation.tables.benchmarks import gpu_table
from torch import nn


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
    changed["kfac/network.fc1"] *= math.nan
    assert math.isnan(relative_difference(found, changed))


# Large networks, by tiny ones that stand in for them


def _images(samples, generator):
    images = torch.randn(samples, 3, 8, 8, generator=generator)
    return images, torch.randint(4, (samples,), generator=generator)


def _tiny():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)
    )


def _gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        # No smaller, or the header takes all of an upload.
        **{"vocab_size": 101, "n_positions": 4, "n_embd": 32, "n_layer": 1, "n_head": 2},
        **{"bos_token_id": 0, "eos_token_id": 0, "use_cache": False},
    )
    return lambda: Logits(transformers.GPT2LMHeadModel(config))


def _texts(samples, generator):
    tokens = torch.randint(101, (samples, 4), generator=generator)
    return tokens, tokens.roll(-1, 1).index_fill(1, torch.tensor(3), -100)


def _missing():
    raise ModuleNotFoundError("No module named 'gone'")


@pytest.fixture
def stand_ins(no_gpu, monkeypatch):
    models = {
        "tiny": RealModel(lambda: _tiny, _images),
        "gone": RealModel(_missing, _images),
        "broken": RealModel(lambda: lambda: nn.Linear(1, 4), _images),
    }
    monkeypatch.setattr(gpu_check, "LARGE_MODELS", models)


FEW = ["--large-samples", "12", "--large-batch-size", "6"]


def test_a_large_network_is_compared_and_timed(stand_ins, tmp_path, capsys):
    output = tmp_path / "check.json"
    gpu_check.main(["--models", "tiny", *FEW, "--output", str(output)])
    report = json.loads(output.read_text())
    assert report["rows"] == []
    (row,) = report["large"]
    assert row["parameters"] == 4 * 27 + 4 + 8 + 4 * 145
    assert row["relative_difference"] == 0
    assert row["in_layer"] in {"0", "1", "4"}
    for step in ("training", "extraction", "packing", "merge"):
        assert row[f"{step}_seconds"] > 0
    assert row["solved"] is True
    assert row["curvature_samples"] == 12
    assert row["extraction_bytes"] is None
    printed = capsys.readouterr().out
    assert all(f"tiny, {step}: " in printed for step in STEPS)
    assert gpu_table(report) in printed
    assert "| model | step |" not in gpu_table(report)


def test_a_language_model_with_a_tied_output_is_measured():
    costs = DeviceCosts(RealModel(_gpt2, _texts, "adamw"), 10, 5, CPU)
    took = {name: value for step in STEPS for name, value in getattr(costs, step)().items()}
    assert took["relative_difference"] == 0
    assert took["training_seconds"] > 0
    assert took["solved"]


def test_without_a_gpu_large_networks_are_left_out_by_name(no_gpu, monkeypatch, capsys):
    run = []
    monkeypatch.setattr(gpu_check, "check", lambda model, *arguments: run.append(model) or [])
    gpu_check.main([])
    assert run == ["lenet", "resnet8"]
    printed = capsys.readouterr().out
    assert "unless --models names them: resnet50, vit_b_16, gpt2." in printed


def test_networks_are_chosen():
    cuda = torch.device("cuda")
    assert gpu_check.choose(None, cuda) == ["lenet", "resnet8", "resnet50", "vit_b_16", "gpt2"]
    for device in (CPU, cuda):
        assert gpu_check.choose(["gpt2", "cnn"], device) == ["gpt2", "cnn"]
    with pytest.raises(SystemExit, match="unknown models what, how: choose from lenet, cnn"):
        gpu_check.choose(["lenet", "what", "how"], CPU)


def test_a_network_whose_package_is_missing_is_left_out(stand_ins, capsys):
    gpu_check.main(["--models", "gone", *FEW])
    printed = capsys.readouterr().out
    assert "gone is left out: No module named 'gone'" in printed
    assert "| gone | left out: No module named 'gone' |" in printed


def test_a_network_that_fails_does_not_keep_others_from_running(stand_ins, capsys):
    with pytest.raises(SystemExit, match="error: broken: RuntimeError"):
        gpu_check.main(["--models", "broken", "tiny", *FEW])
    table = capsys.readouterr().out.splitlines()[-2:]
    assert table[0].startswith("| broken | failed: RuntimeError")
    assert table[1].startswith("| tiny | 0.0 | 0e+00 |")
    assert table[0].count("|") == table[1].count("|")


def test_a_large_network_that_differs_fails_the_check(stand_ins, monkeypatch):
    found = {"parameters": 1, "relative_difference": math.nan, "in_layer": "0"}
    monkeypatch.setattr(DeviceCosts, "difference", lambda self: found)
    with pytest.raises(SystemExit, match="error: the devices differ"):
        gpu_check.main(["--models", "tiny", *FEW])


def test_the_table_shows_memory_of_a_gpu():
    row = {"model": "tiny", "parameters": 2e6, "relative_difference": 1e-5, "in_layer": "0"}
    row |= {f"{step}_bytes": 3e9 for step in ("training", "extraction", "merge")}
    row |= {"training_seconds": 0.002, "extraction_seconds": 1.2, "packing_seconds": 3.0}
    row |= {"merge_seconds": 4.0, "iterations": 5, "solved": True, "curvature_samples": 300}
    report = {"device": "cuda", "rows": [], "large": [row]}
    header, _, line = gpu_table(report).splitlines()
    assert header.startswith("| model | weights, M | relative difference |")
    assert line == "| tiny | 2.0 | 1e-05 | 2.00 | 1.2 | 2.00 | 3.0 | 4.0 | 5 | 3.0 | 3.0 | 3.0 |"


@pytest.mark.parametrize(("name", "millions"), [("resnet50", 24), ("vit_b_16", 86), ("gpt2", 124)])
def test_large_networks_have_the_sizes_of_those_in_use(name, millions):
    if name == "gpt2":
        pytest.importorskip("transformers")
    with torch.device("meta"):
        network = LARGE_MODELS[name].load()()
    assert round(sum(weight.numel() for weight in network.parameters()) / 1e6) == millions
    x, y = LARGE_MODELS[name].draw(2, torch.Generator().manual_seed(0))
    if name == "gpt2":  # whose mask is no work for meta tensors
        assert x.shape == y.shape == (2, 128)
    else:
        assert x.shape == (2, 3, 224, 224)
        assert network.eval()(x.to("meta")).shape == (2, 10)


def test_the_head_of_the_vision_transformer_is_not_zero(monkeypatch):
    def small(num_classes):
        return torchvision.models.VisionTransformer(16, 8, 1, 1, 4, 4, num_classes=num_classes)

    monkeypatch.setattr(torchvision.models, "vit_b_16", small)
    assert LARGE_MODELS["vit_b_16"].load()().heads.head.weight.all()


def test_convolutions_are_exact_for_a_while(monkeypatch):
    for before in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
        with exact_convolutions():
            assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.allow_tf32 is before


def test_a_cpu_has_no_device_memory():
    assert peak_device_memory(lambda: "done", CPU) == ("done", None)


def test_the_worst_difference_is_one_that_is_no_number():
    assert worst({"a": 0.5, "b": 2.0, "c": 1.0}) == "b"
    assert worst({"a": 0.5, "b": 2.0, "c": math.nan}) == "c"
