"""The recipe end to end on embedded data: what it writes, how it resumes, what it refuses."""

import contextlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import cifar_resnet
import pytest
import torch
from helpers.wandb_runs import read_runs
from safetensors.torch import load_file, save_file
from simulation import clients
from simulation.clients import EXTRACTIONS
from simulation.models import build_model

from lightning_fedfisher import ClientUpdate
from lightning_fedfisher.report.page import write_report
from lightning_fedfisher.results.record import FederationRecord

RECIPE = Path(cifar_resnet.__file__)
SMALL = ["--dataset", "digits", "--model", "lenet", "--clients", "3", "--alpha", "1"]
QUICK = [*SMALL, "--epochs", "1", "--max-train-samples", "240"]


@pytest.fixture(scope="module")
def federation(tmp_path_factory, few_published_steps):
    """One finished federation: its folder and its report."""
    output = tmp_path_factory.mktemp("recipe") / "out"
    flags = cifar_resnet.parse_flags([*QUICK, "--output-dir", str(output)])
    return output, cifar_resnet.run(flags)


@pytest.fixture(scope="module")
def runs(federation):
    """The W&B runs of the finished federation, which take long to read."""
    return read_runs(federation[0])


def test_report_has_the_documented_form(federation):
    output, results = federation
    written = json.loads((output / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert sum(client["num_samples"] for client in written["clients"]) == 240
    accuracies = [client["accuracy"] for client in written["clients"]]
    assert written["best_client"]["accuracy"] == max(accuracies)
    scores = {"accuracy", "nll", "calibration_error"}
    assert set(written["ensemble"]) == set(written["best_client"]) == scores
    assert set(written["methods"]) == set(EXTRACTIONS)
    for row in written["methods"].values():
        assert set(row) == scores | {
            "upload_bytes",
            "fedavg_bytes",
            "client_seconds",
            "server_seconds",
            "server_labels",
            "unlabelled_samples",
        }
        assert 0 <= row["accuracy"] <= 100
    labels = {name: row["server_labels"] for name, row in written["methods"].items()}
    assert labels["fedfisher"] == labels["fedavg"] == labels["fisher_merge"] == 0
    assert labels["fedfisher_kfac"] == labels["fedfisher_diag"] == 500
    assert written["config"]["dataset"] == "digits"
    assert not {"init", "new_head", "rounds"} & set(written["config"])
    assert "rounds" not in written
    assert not list(output.glob("round-*"))


def test_uploads_are_the_sizes_of_the_files(federation):
    output, results = federation
    sizes = [path.stat().st_size for path in (output / "updates").glob("*/kfac-normalised.*")]
    assert results["methods"]["fedfisher"]["upload_bytes"] == round(sum(sizes) / len(sizes))
    weights = sum(p.numel() for p in build_model("lenet", 3, 32, 10).parameters())
    assert results["methods"]["fedfisher"]["fedavg_bytes"] == 4 * weights
    for row in results["methods"].values():
        assert 0.5 < row["upload_bytes"] / (4 * weights) <= 1.0


def test_merged_model_loads_into_the_network(federation):
    output, _ = federation
    network = build_model("lenet", 3, 32, 10)
    state = load_file(output / "merged.safetensors")
    network.load_state_dict({name.removeprefix("network."): t for name, t in state.items()})
    assert all(torch.isfinite(p).all() for p in network.parameters())


def test_the_record_tells_what_the_results_tell_and_more(federation):
    output, results = federation
    record = FederationRecord.load(output)
    assert record.title == "digits, lenet, 3 clients, alpha 1"
    assert record.merges[0].method == "fedfisher"
    for merge in record.merges:
        row = results["methods"][merge.method]
        assert merge.score.accuracy == row["accuracy"]
        assert merge.upload_bytes == row["upload_bytes"]
        assert sum(map(sum, merge.score.confusion)) == 360
        right = sum(merge.score.confusion[k][k] for k in range(10))
        assert right / 3.6 == pytest.approx(row["accuracy"], abs=1e-4)
        assert len(merge.distances) == len(merge.layers) == 5
    for client, row in zip(record.clients, results["clients"], strict=True):
        assert sum(client.class_counts) == client.num_samples == row["num_samples"]
        assert client.score.accuracy == row["accuracy"]
        assert len(client.train_loss) == 1
        assert all(layer.trace > 0 and layer.spectrum for layer in client.curvature)
    assert record.best_client.accuracy == results["best_client"]["accuracy"]


def test_the_report_is_of_the_record(federation, tmp_path):
    output, _ = federation
    write_report(FederationRecord.load(output), tmp_path / "report.html")
    page = (output / "report.html").read_text()
    assert (tmp_path / "report.html").read_text() == page
    assert "digits, lenet, 3 clients, alpha 1" in page


CLIENTS = ["client-0", "client-1", "client-2"]
SERVERS = [f"server-{method}" for method in EXTRACTIONS]


def test_wandb_runs_belong_together(federation, runs):
    _, results = federation
    assert sorted(runs) == sorted([*CLIENTS, *SERVERS])
    assert {run.group for run in runs.values()} == {"digits-lenet-a1-p3-s0-out"}
    assert [runs[name].job_type for name in CLIENTS] == ["client"] * 3
    assert [runs[name].job_type for name in SERVERS] == ["server"] * len(EXTRACTIONS)
    assert len({run.id for run in runs.values()}) == len(runs)
    for name, run in runs.items():
        assert set(run.tags) == {"digits", "lenet"}
        for flag, value in results["config"].items():
            if flag != "data_dir":
                assert run.config[flag] == value, (name, flag)
        assert run.config["versions"]["torch"] == torch.__version__.split("+")[0]
        assert set(run.config) >= {"git", "versions"}
        assert run.axes["*"] == "trainer/global_step"
    assert runs["server-fedfisher"].config["method"] == "fedfisher"


def test_a_clients_run_tells_of_its_data_training_and_curvature(federation, runs):
    for index, client in enumerate(FederationRecord.load(federation[0]).clients):
        run = runs[f"client-{index}"]
        assert run.axes["train_loss"] == "epoch"
        losses = [item["train_loss"] for item in run.history if "train_loss" in item]
        assert losses == pytest.approx(client.train_loss)
        for name in ("accuracy", "nll", "calibration_error"):
            assert run.summary[f"test/{name}"] == pytest.approx(getattr(client.score, name))
        kind = "fedfisher"
        assert run.summary[f"{kind}/upload_bytes"] == client.upload_bytes
        seconds = client.extraction_seconds
        assert run.summary[f"{kind}/extraction_seconds"] == pytest.approx(seconds)
        for layer in client.curvature:
            # The update is rounded, what is logged is not.
            logged = run.summary[f"{kind}/trace/{layer.layer}"]
            assert logged == pytest.approx(layer.trace, rel=0.05)
            assert f"{kind}/effective_rank/{layer.layer}" in run.summary
        assert {"data/classes", f"{kind}/spectrum"} <= run.charts
        assert run.table("data/classes_table") == [
            [f"class {k}", count] for k, count in enumerate(client.class_counts)
        ]
        assert len(run.table(f"{kind}/curvature")) == 5


def test_a_servers_run_tells_how_its_merge_went(federation, runs):
    for merge in FederationRecord.load(federation[0]).merges:
        run = runs[f"server-{merge.method}"]
        assert run.axes["residual"] == run.axes["objective"] == "iterations"
        curve = [item for item in run.history if "residual" in item]
        for item, entry in zip(curve, merge.history, strict=True):
            for name in ("residual", "objective", "iterations"):
                assert item[name] == pytest.approx(entry[name], rel=1e-5)
        rows = run.table("clients")
        expected = [own for row in merge.distances for own in row]
        assert [row[2] for row in rows] == pytest.approx(expected)
        assert [row[:2] for row in rows[:3]] == [[merge.layers[0], c] for c in CLIENTS]
        for index, client in enumerate(CLIENTS):
            whole = sum(row[index] ** 2 for row in merge.distances) ** 0.5
            assert run.summary[f"distance/{client}"] == pytest.approx(whole)
            most = max(row[index] for row in merge.influence)
            assert run.summary[f"influence/{client}"] == pytest.approx(most)
        assert run.summary["test/accuracy"] == pytest.approx(merge.score.accuracy)
        assert run.summary["server_labels"] == merge.server_labels


def test_the_main_servers_run_compares_all(federation, runs):
    output, results = federation
    run, record = runs["server-fedfisher"], FederationRecord.load(output)
    comparison = run.table("comparison")
    names = ["best single client", "ensemble of clients", *(m.method for m in record.merges)]
    assert [row[0] for row in comparison] == names
    assert comparison[2][1] == results["methods"]["fedfisher"]["accuracy"]
    assert comparison[2][4] == results["methods"]["fedfisher"]["upload_bytes"]
    assert {"accuracy", "confusion/before", "confusion/after"} <= run.charts
    counts = [row[2] for row in run.table("confusion/after_table")]
    assert counts == [n for row in record.merges[0].score.confusion for n in row]
    assert [row[1:] for row in run.table("partition")] == [
        [client.num_samples, *client.class_counts] for client in record.clients
    ]
    assert run.summary["merged_model"] == str(output / "merged.safetensors")
    assert "accuracy" not in runs["server-fedavg"].charts


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
        with pytest.raises(ValueError, match="another initial_weights"):
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


ROUNDS = [*QUICK, "--methods", "fedavg", "fedfisher"]
SILENT = ["--wandb", "disabled"]


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory):
    """A finished federation of two rounds: its folder, its report and what it printed."""
    output = tmp_path_factory.mktemp("rounds") / "out"
    flags = cifar_resnet.parse_flags([*ROUNDS, "--rounds", "2", "--output-dir", str(output)])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        results = cifar_resnet.run(flags)
    assert results == json.loads((output / "results.json").read_text())
    return output, results, printed.getvalue()


def resume(output, *arguments):
    flags = [*ROUNDS, *SILENT, "--output-dir", str(output), "--resume", *arguments]
    return cifar_resnet.run(cifar_resnet.parse_flags(flags))


def test_each_round_is_reported_and_written(two_rounds):
    output, results, printed = two_rounds
    first, second = results["rounds"]
    own = json.loads((output / "round-2" / "results.json").read_text())
    for number, entry, report in ((1, first, results), (2, second, own)):
        assert set(entry) == {"round", "best_client", "ensemble", "methods"}
        assert entry["round"] == number
        for name in ("best_client", "ensemble"):
            assert entry[name] == report[name]
        for method in ("fedavg", "fedfisher"):
            row = report["methods"][method]
            assert entry["methods"][method] == {"accuracy": row["accuracy"], "nll": row["nll"]}
        assert printed.count(f"Test accuracy after round {number} of 2") == 1
    assert "round 2 of 2, from the model of fedfisher" in printed
    assert results["config"]["rounds"] == 2
    assert first["methods"] != second["methods"]
    names = {path.name for path in output.iterdir()} - {"wandb", "round-2"}
    assert {path.name for path in (output / "round-2").iterdir()} == names
    names = [*CLIENTS, *(f"server-{method}" for method in results["methods"])]
    assert sorted(read_runs(output)) == sorted([*names, *(f"{n}-round-2" for n in names)])


def test_the_first_of_two_rounds_is_a_run_of_one(two_rounds, federation):
    merged = load_file(two_rounds[0] / "merged.safetensors")
    alone = load_file(federation[0] / "merged.safetensors")
    assert all(torch.equal(merged[name], alone[name]) for name in alone)
    assert two_rounds[1]["clients"] == federation[1]["clients"]


def test_later_rounds_start_from_the_merged_model_and_shuffle_anew(tmp_path, monkeypatch):
    starts, seeds = [], []

    def fit_client(network, *arguments, seed, **options):
        starts.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        seeds.append(seed)
        return clients.fit_client(network, *arguments, seed=seed, **options)

    monkeypatch.setattr("simulation.round.fit_client", fit_client)
    output = tmp_path / "out"
    arguments = [*ROUNDS, *SILENT, "--methods", "fedavg", "fisher_merge", "--rounds", "3"]
    arguments += ["--curvature-samples", "20"]
    cifar_resnet.run(cifar_resnet.parse_flags([*arguments, "--output-dir", str(output)]))
    for number, folder in ((2, output), (3, output / "round-2")):
        merged = load_file(folder / "merged.safetensors")
        for start in starts[3 * (number - 1) : 3 * number]:
            assert {f"network.{name}" for name in start} == set(merged)
            assert all(torch.equal(start[name], merged[f"network.{name}"]) for name in start)
    assert seeds == [100_000 * number + client for number in range(3) for client in range(3)]


def test_resuming_in_round_two_keeps_what_is_finished(two_rounds, tmp_path, capsys):
    source, results, _ = two_rounds
    output = tmp_path / "out"
    shutil.copytree(source, output)
    second = output / "round-2"
    # As if it was stopped while the third client of round 2 trained; round 1 may lose its uploads.
    (second / "clients" / "client-2.json").unlink()
    (second / "results.json").unlink()
    shutil.rmtree(output / "updates")
    models = {path: path.read_bytes() for path in output.rglob("merged.safetensors")}
    again = resume(output, "--rounds", "2")
    printed = capsys.readouterr().out
    assert "round 1 of 2 (kept)" in printed
    assert len(re.findall(r"client \d of 3, \d+ samples \(kept\)", printed)) == 2
    assert printed.count(": training") == 1
    assert {path: path.read_bytes() for path in models} == models
    assert again["rounds"] == results["rounds"]
    assert again == json.loads((output / "results.json").read_text())
    # All finished: nothing is trained or merged, unless further rounds or methods are asked for.
    assert resume(output, "--rounds", "2")["rounds"] == results["rounds"]
    printed = capsys.readouterr().out
    assert "round 2 of 2, from the model of fedfisher (kept)" in printed
    assert not re.search(": training|merging with", printed)
    longer = resume(output, "--rounds", "3")
    assert longer["rounds"][:2] == results["rounds"]
    assert len(longer["rounds"]) == longer["config"]["rounds"] == 3
    assert capsys.readouterr().out.count(": training") == 3


def test_clients_of_another_start_are_not_kept(two_rounds, tmp_path):
    """With another headline method, round 2 starts elsewhere: its clients are not its own."""
    output = tmp_path / "out"
    shutil.copytree(two_rounds[0], output)
    with pytest.raises(ValueError, match=r"round-2.*another initial_weights"):
        resume(output, "--rounds", "2", "--methods", "fedavg")


def test_later_rounds_of_other_federations_are_refused_at_once(two_rounds, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(two_rounds[0] / "round-2", output / "round-2")
    flags = [*ROUNDS, *SILENT, "--rounds", "2", "--output-dir", str(output)]
    with pytest.raises(ValueError, match=r"round-2 already holds .* add --resume"):
        cifar_resnet.run(cifar_resnet.parse_flags(flags))
    assert not (output / "clients").exists()
    with pytest.raises(ValueError, match="--rounds must be at least 1, got 0"):
        cifar_resnet.run(cifar_resnet.parse_flags([*ROUNDS, "--rounds", "0"]))


def test_every_flag_is_in_the_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        cifar_resnet.parse_flags(["--help"])
    text = capsys.readouterr().out
    for flag in (
        *("--config", "--dataset", "--data-dir", "--model", "--clients", "--alpha", "--seed"),
        *("--partition-seed", "--epochs", "--max-train-samples", "--methods", "--output-dir"),
        *("--wandb", "--accelerator", "--devices", "--resume", "--init", "--new-head"),
        "--rounds",
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


def test_errors_end_with_one_line_and_no_traceback(tmp_path, monkeypatch):
    """Python prints the text that it is left with, and nothing else."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back at the end
    for arguments, message in (
        (["--dataset", "imagefolder", "--data-dir", str(tmp_path / "none")], "train"),
        ([*QUICK, "--alpha", "0.1", "--clients", "200"], "larger alpha"),
    ):
        with warnings.catch_warnings(), pytest.raises(SystemExit) as left:
            cifar_resnet.main([*arguments, "--output-dir", str(tmp_path / "out")])
        assert isinstance(left.value.code, str)
        assert left.value.code.startswith("error: ")
        assert message in left.value.code


def test_interrupted_in_client_three_the_others_survive(tmp_path, capsys):
    """Ctrl-C while the third client trains; ``--resume`` goes on from there."""
    output = tmp_path / "out"
    methods = ["--methods", "fedavg", "fedfisher", "--wandb", "disabled"]
    flags = [*SMALL, "--epochs", "15", "--max-train-samples", "720", *methods]
    flags += ["--curvature-samples", "50", "--output-dir", str(output)]
    running = subprocess.Popen(
        [sys.executable, str(RECIPE), *flags],
        stdout=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores Ctrl-C, and its children do, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in running.stdout:
        if re.match(r"client 3 of 3, \d+ samples: training", line):
            time.sleep(0.3)
            running.send_signal(signal.SIGINT)
    assert running.wait(timeout=60) != 0
    kept = sorted(path.name for path in (output / "clients").glob("*.json"))
    assert kept == ["client-0.json", "client-1.json"]
    for path in (output / "updates").rglob("*.safetensors"):
        ClientUpdate.open(path).verify()
    cifar_resnet.run(cifar_resnet.parse_flags([*flags, "--resume"]))
    assert capsys.readouterr().out.count("(kept)") == 2
    assert "fedfisher" in json.loads((output / "results.json").read_text())["methods"]
