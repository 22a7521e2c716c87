"""The recipe end to end on embedded data: what it writes, how it resumes, what it refuses."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cifar_resnet
import pytest
import torch
from safetensors.torch import load_file, save_file
from simulation.models import build_model

from lightning_fedfisher import METHODS, ClientUpdate

RECIPE = Path(cifar_resnet.__file__)
SMALL = ["--dataset", "digits", "--model", "lenet", "--clients", "3", "--alpha", "1"]
QUICK = [*SMALL, "--epochs", "1", "--max-train-samples", "240"]


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """One finished federation: its folder and its report."""
    output = tmp_path_factory.mktemp("recipe") / "out"
    flags = cifar_resnet.parse_flags([*QUICK, "--output-dir", str(output)])
    return output, cifar_resnet.run(flags)


def test_report_has_the_documented_form(federation):
    output, results = federation
    written = json.loads((output / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert sum(client["num_samples"] for client in written["clients"]) == 240
    accuracies = [client["accuracy"] for client in written["clients"]]
    assert written["best_client"]["accuracy"] == max(accuracies)
    assert set(written["ensemble"]) == {"accuracy", "nll"}
    assert set(written["methods"]) == set(METHODS)
    for row in written["methods"].values():
        assert set(row) == {
            "accuracy",
            "nll",
            "upload_bytes",
            "fedavg_bytes",
            "client_seconds",
            "server_seconds",
            "server_labels",
        }
        assert 0 <= row["accuracy"] <= 100
    labels = {name: row["server_labels"] for name, row in written["methods"].items()}
    assert labels["fedfisher"] == labels["fedavg"] == labels["fisher_merge"] == 0
    assert labels["fedfisher_kfac"] == labels["fedfisher_diag"] == 500
    assert written["config"]["dataset"] == "digits"
    assert not {"init", "new_head"} & set(written["config"])


def test_uploads_are_the_sizes_of_the_files(federation):
    output, results = federation
    sizes = [path.stat().st_size for path in (output / "updates").glob("*/kfac-normalised.*")]
    assert results["methods"]["fedfisher"]["upload_bytes"] == round(sum(sizes) / len(sizes))
    weights = sum(p.numel() for p in build_model("lenet", 3, 32, 10).parameters())
    assert results["methods"]["fedfisher"]["fedavg_bytes"] == 4 * weights
    assert 1.0 < results["methods"]["fedavg"]["upload_bytes"] / (4 * weights) < 1.1


def test_merged_model_loads_into_the_network(federation):
    output, _ = federation
    network = build_model("lenet", 3, 32, 10)
    state = load_file(output / "merged.safetensors")
    network.load_state_dict({name.removeprefix("network."): t for name, t in state.items()})
    assert all(torch.isfinite(p).all() for p in network.parameters())


def test_pictures_and_wandb_runs_are_written(federation):
    output, _ = federation
    for name in ("partition", "accuracy", "merge"):
        assert (output / f"{name}.png").stat().st_size > 5000
    assert len(list((output / "wandb").glob("offline-run-*"))) == 4


def test_resuming_keeps_finished_clients(federation, capsys):
    output, results = federation
    before = {path: path.stat().st_mtime_ns for path in (output / "updates").rglob("*.safetensors")}
    arguments = [*QUICK, "--output-dir", str(output), "--resume", "--wandb", "disabled"]
    again = cifar_resnet.run(cifar_resnet.parse_flags(arguments))
    assert capsys.readouterr().out.count("(kept)") == 3
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again["clients"] == results["clients"]
    assert again["methods"]["fedfisher"]["accuracy"] == results["methods"]["fedfisher"]["accuracy"]


def test_folders_of_other_federations_are_refused(federation):
    output, _ = federation
    with pytest.raises(ValueError, match="add --resume"):
        cifar_resnet.run(cifar_resnet.parse_flags([*QUICK, "--output-dir", str(output)]))
    other = [*QUICK, "--output-dir", str(output), "--resume", "--learning-rate", "0.1"]
    with pytest.raises(ValueError, match="another learning_rate"):
        cifar_resnet.run(cifar_resnet.parse_flags(other))


@pytest.mark.parametrize("prefix", ["", "network."])
def test_clients_and_merge_start_from_given_weights(federation, tmp_path, prefix):
    """Without a step of SGD to speak of, the average of the clients is what they started from."""
    merged = load_file(federation[0] / "merged.safetensors")
    start = {prefix + name.removeprefix("network."): tensor for name, tensor in merged.items()}
    save_file(start, tmp_path / "start.safetensors")
    output = tmp_path / "out"
    given = ["--init", str(tmp_path / "start.safetensors"), "--output-dir", str(output)]
    still = [*QUICK, "--learning-rate", "1e-30", "--methods", "fedavg", "--wandb", "disabled"]
    results = cifar_resnet.run(cifar_resnet.parse_flags([*still, *given]))
    assert results["config"]["init"] == str(tmp_path / "start.safetensors")
    found = load_file(output / "merged.safetensors")
    assert all(torch.allclose(found[name], merged[name], atol=1e-6) for name in merged)
    setting = json.loads((output / "clients" / "client-0.json").read_text())["setting"]
    assert "init" not in setting
    # Kept from a copy that lies elsewhere, and not from other weights or the seeded ones.
    moved = (tmp_path / "start.safetensors").rename(tmp_path / "moved.safetensors")
    again = [*still, "--output-dir", str(output), "--resume"]
    cifar_resnet.run(cifar_resnet.parse_flags([*again, "--init", str(moved)]))
    save_file({name: tensor + 1 for name, tensor in start.items()}, moved)
    for other in (["--init", str(moved)], []):
        with pytest.raises(ValueError, match="another start"):
            cifar_resnet.run(cifar_resnet.parse_flags([*again, *other]))


def test_starts_that_do_not_fit_are_refused_before_anything_is_written(federation, tmp_path):
    given = ["--init", str(federation[0] / "merged.safetensors")]
    for arguments, message in (
        ([*QUICK, "--model", "cnn", *given], "fc1.weight is of shape"),
        ([*QUICK, "--init", str(federation[0] / "results.json")], "no whole safetensors file"),
        ([*QUICK, "--new-head"], "add --init"),
    ):
        flags = cifar_resnet.parse_flags([*arguments, "--output-dir", str(tmp_path / "out")])
        with pytest.raises(ValueError, match=message):
            cifar_resnet.run(flags)
    assert not (tmp_path / "out").exists()


def test_every_flag_is_in_the_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        cifar_resnet.parse_flags(["--help"])
    text = capsys.readouterr().out
    for flag in (
        *("--config", "--dataset", "--data-dir", "--model", "--clients", "--alpha", "--seed"),
        *("--partition-seed", "--epochs", "--max-train-samples", "--methods", "--output-dir"),
        *("--wandb", "--accelerator", "--devices", "--resume", "--init", "--new-head"),
    ):
        assert flag in text


def test_a_config_file_sets_flags_and_the_command_line_wins(tmp_path):
    config = tmp_path / "flags.yaml"
    config.write_text("alpha: 0.5\nclients: 7\nmethods: [fedavg, fedfisher]\ndata_dir: here\n")
    flags = cifar_resnet.parse_flags(["--config", str(config), "--clients", "2"])
    assert (flags.alpha, flags.clients, flags.data_dir) == (0.5, 2, Path("here"))
    assert flags.methods == ["fedavg", "fedfisher"]
    with pytest.raises(SystemExit, match="2"):
        cifar_resnet.parse_flags(["--methods", "fedsgd"])


def test_errors_end_with_one_line_and_no_traceback(tmp_path):
    for arguments, message in (
        (["--dataset", "imagefolder", "--data-dir", str(tmp_path / "none")], "train"),
        ([*QUICK, "--alpha", "0.1", "--clients", "200"], "larger alpha"),
    ):
        command = [sys.executable, str(RECIPE), *arguments, "--output-dir", str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 1
        assert "error: " in done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_interrupted_in_client_three_the_others_survive(tmp_path):
    """Ctrl-C while the third client trains; ``--resume`` goes on from there."""
    output = tmp_path / "out"
    methods = ["--methods", "fedavg", "fedfisher", "--wandb", "disabled"]
    command = [sys.executable, str(RECIPE), *SMALL, "--epochs", "15", "--output-dir", str(output)]
    running = subprocess.Popen(
        [*command, *methods],
        stdout=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores Ctrl-C, and its children do, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in running.stdout:
        if re.match(r"client 3 of 3, \d+ samples: training", line):
            time.sleep(0.5)
            running.send_signal(signal.SIGINT)
    assert running.wait(timeout=60) != 0
    kept = sorted(path.name for path in (output / "clients").glob("*.json"))
    assert kept == ["client-0.json", "client-1.json"]
    for path in (output / "updates").rglob("*.safetensors"):
        ClientUpdate.open(path).verify()
    done = subprocess.run(
        [*command, *methods, "--resume"], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(kept)") == 2
    assert "fedfisher" in json.loads((output / "results.json").read_text())["methods"]
