"""``fedfisher merge``, run as a user runs it but for the process."""

import errno
import os
import subprocess
import sys

import pytest
import torch
from helpers.federation import TinyClassifier, quiet_trainer
from helpers.small_updates import Shared
from safetensors.torch import load_file

from lightning_fedfisher import ClientUpdate, FisherMergeModule
from lightning_fedfisher.cli.main import main
from lightning_fedfisher.curvature.base import Identity
from lightning_fedfisher.layers import find_layers
from lightning_fedfisher.merge.memory_budget import peak_bytes
from lightning_fedfisher.merge.merger import Merger
from lightning_fedfisher.merge.options import MergeOptions
from lightning_fedfisher.results import FederationRecord
from lightning_fedfisher.update.header import UpdateHeader


def _merged(files, **options):
    module = FisherMergeModule(files, **options)
    quiet_trainer(".", max_epochs=-1).fit(module)
    return module.merged_state_dict()


def _same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("method", ["fedfisher", "fedavg"])
def test_merge_writes_what_the_module_merges(folder, capsys, method):
    assert (
        main(["merge", "updates/*.safetensors", "--output", "m.safetensors", "--method", method])
        == 0
    )
    assert "10 updates merged" in capsys.readouterr().out
    files = sorted((folder / "updates").glob("*"))
    _same(load_file("m.safetensors"), _merged(files, method=method))
    TinyClassifier().load_state_dict(load_file("m.safetensors"))
    card = (folder / "m.md").read_text()
    for part in (f"`{method}`", "`client-9`", "| 110 |", f"torch {torch.__version__}"):
        assert part.split("+")[0] in card
    assert not list(folder.glob("*.partial"))


def test_a_file_that_two_patterns_name_is_merged_once(folder, capsys):
    patterns = ["updates/*.safetensors", "updates/client-0.*"]
    assert main(["merge", *patterns, "--output", "m.safetensors", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("client-0.safetensors") == 1


def test_merge_leaves_a_record_to_report_on(folder, capsys):
    command = ["merge", "updates/*.safetensors", "--output", "m.safetensors"]
    assert main([*command, "--max-influence", "3"]) == 0
    record = FederationRecord.load("m.json")
    updates = [ClientUpdate.open(path) for path in sorted((folder / "updates").glob("*"))]
    assert [(c.name, c.num_samples, c.upload_bytes) for c in record.clients] == [
        (f"client-{k}", update.num_samples, update.upload_bytes) for k, update in enumerate(updates)
    ]
    (merge,) = record.merges
    assert merge.method == "fedfisher"
    assert merge.server_seconds > 0
    assert merge.history[-1]["residual"] < 1e-3
    assert len(merge.layers) == len(merge.distances) == len(merge.influence) == 4
    assert merge.upload_bytes == round(sum(u.upload_bytes for u in updates) / len(updates))
    assert record.config["max_influence"] == 3
    capsys.readouterr()
    assert main(["report", "m.json"]) == 0
    assert capsys.readouterr().out.startswith("m.html: 10 clients, 1 merge, ")


def test_merge_goes_on_without_the_bad_one_if_told_to(folder, capsys, damage):
    bad = folder / "updates/client-0.safetensors"
    damage(bad)
    command = ["merge", "updates/*.safetensors", "--output", "m.safetensors"]
    assert main(command) == 1
    told = capsys.readouterr().err
    assert "client-0.safetensors" in told
    assert "does not match its digest" in told
    assert not (folder / "m.safetensors").exists()
    assert main([*command, "--skip-invalid"]) == 0
    told = capsys.readouterr()
    assert "1 of 10 updates left out" in told.err
    assert "client-0.safetensors" in told.err
    assert "9 updates merged" in told.out
    files = sorted((folder / "updates").glob("*"))
    _same(load_file("m.safetensors"), _merged([file for file in files if file != bad]))


def test_a_dry_run_tells_and_writes_nothing(folder, capsys):
    before = sorted(folder.rglob("*"))
    assert main(["merge", "updates/*", "--output", "new/m.safetensors", "--dry-run"]) == 0
    told = capsys.readouterr().out
    for part in ("would merge 10 updates, 4 layers", "265 weights", "client-9", "memory: about"):
        assert part in told
    assert sorted(folder.rglob("*")) == before


def _peak_bytes(files, *method, **options):
    merger = Merger.open(files, MergeOptions(*method, **options))
    return peak_bytes(merger.updates[0].header, len(merger.updates), merger.loader.budget)


def test_the_estimate_of_memory_counts_models_curvature_and_the_longest_side(folder):
    files = sorted((folder / "updates").glob("*"))
    # Factors twice: as they are, and in the eigenbasis in which they are merged.
    sent = 265 + 2 * sum(side**2 for side in (3, 10, 4, 28, 6, 17, 3, 7))
    fixed = 3 * 4 * 265 + 6 * 8 * 28**2
    assert _peak_bytes(files) == fixed + 10 * 4 * sent
    # The largest layer alone: all weights of it, and a client's curvature twice.
    alone = 10 * 4 * 4 * 28 + 2 * 4 * (4**2 + 28**2)
    assert _peak_bytes(files, memory_budget=1000) == fixed + alone
    assert _peak_bytes(files, memory_budget=40000) == fixed + 40000
    assert _peak_bytes(files, "fedavg", memory_budget=0) >= fixed


def test_flags_may_stand_in_a_file(folder):
    (folder / "flags.yaml").write_text("method: fedavg\noutput: m.safetensors\nmax_influence: 2\n")
    assert main(["merge", "--config", "flags.yaml", "updates/*.safetensors"]) == 0
    files = sorted((folder / "updates").glob("*"))
    _same(load_file("m.safetensors"), _merged(files, method="fedavg", max_influence=2))
    assert "max_influence 2" in (folder / "m.md").read_text()


def test_shared_and_frozen_parameters_come_with_a_model(folder):
    torch.manual_seed(0)
    model = Shared()
    layers = find_layers(model)
    blocks = {layer.name: Identity(layer.shape) for layer in layers}
    kinds = dict.fromkeys(blocks, "identity")
    header = UpdateHeader(5, "identity", "", "categorical", 0, layers, kinds)
    ClientUpdate.from_model(model, header, blocks).save("tied.safetensors")
    (folder / "tied.py").write_text(
        "import torch\nfrom helpers.small_updates import Shared\n"
        "def make():\n    torch.manual_seed(0)\n    return Shared()\n"
    )
    command = ["merge", "tied.safetensors", "--method", "fedavg", "--output"]
    assert main([*command, "alone.safetensors"]) == 0
    alone = load_file("alone.safetensors")
    assert "third.weight" in alone
    assert "first.weight" not in alone
    assert main([*command, "whole.safetensors", "--model", "tied:make"]) == 0
    _same(load_file("whole.safetensors"), model.state_dict())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--output", "m.pt"], "must be named NAME.safetensors"),
        (["--output", "updates/client-0.safetensors"], "is one of the updates"),
        (
            ["--output", "m.safetensors", "--method", "regmean", "--max-influence", "0"],
            "at least 1",
        ),
        (["--output", "m.safetensors", "--accelerator", "abacus"], "abacus"),
        (["--output", "flags/m.safetensors"], "flags"),
        (["--output", "m.safetensors", "--model", "factories:foreign"], "does not fit"),
        (["--output", "m.safetensors", "--model", "factories:nothing"], "makes a int"),
        (["--output", "m.safetensors", "--model", "nowhere:make"], "makes no model"),
        (["--output", "m.safetensors", "--model", "factories"], "makes no model"),
    ],
)
def test_merge_refuses_with_a_reason(folder, capsys, arguments, reason):
    (folder / "flags").write_text("a file where a folder is wanted")
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert main(["merge", "updates/*.safetensors", *arguments]) == 1
    assert reason in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*.safetensors")} == before


def test_two_processes_write_the_same(folder):
    command = [
        sys.executable,
        "-m",
        "lightning_fedfisher.cli.main",
        "merge",
        "updates/*.safetensors",
    ]
    ranks = ["--accelerator", "cpu", "--devices", "2", "--output", "two.safetensors"]
    done = subprocess.run([*command, *ranks], capture_output=True, text=True, check=True)
    assert done.stdout.count("two.safetensors") == 1
    assert main(["merge", "updates/*.safetensors", "--output", "one.safetensors"]) == 0
    assert (folder / "one.safetensors").read_bytes() == (folder / "two.safetensors").read_bytes()
    clients = [
        (folder / f"{name}.md").read_text().split("## Clients")[1] for name in ("one", "two")
    ]
    assert clients[0] == clients[1]


def test_an_update_is_found_whatever_its_folder_is_called(folder, capsys):
    odd = "losses=[temporal], größe"
    (folder / "updates").rename(folder / odd)
    for given in (odd, f"{odd}/*.safetensors"):
        assert main(["merge", given, "--output", f"{odd}/new/m.safetensors"]) == 0
        assert f"{odd}/new/m.safetensors: 10 updates merged" in capsys.readouterr().out
    record = FederationRecord.load(folder / odd / "new" / "m.json")
    assert record.config["files"] == [f"{odd}/*.safetensors"]


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_an_output_that_cannot_be_written_is_refused_before_the_merge(folder, capsys, dry):
    (folder / "file").write_text("")
    (folder / "m.json").mkdir()
    before = sorted(folder.rglob("*"))
    for output, told in (
        ("file/m.safetensors", ["file/m.safetensors cannot", "file/m.md cannot", "file stands"]),
        ("m.safetensors", ["m.json cannot be written: it is a folder"]),
        ("/proc/none/m.safetensors", ["/proc/none/m.safetensors cannot be written"]),
    ):
        assert main(["merge", "missing.safetensors", "--output", output, *dry]) == 1
        error = capsys.readouterr().err
        assert all(part in error for part in told)
        assert "missing.safetensors" not in error  # before any update is read
    assert sorted(folder.rglob("*")) == before


def test_a_merge_that_is_refused_leaves_no_folder(folder, damage):
    damage(folder / "updates/client-0.safetensors")
    assert main(["merge", "updates", "--output", "new/m.safetensors"]) == 1
    assert not (folder / "new").exists()


@pytest.mark.parametrize("failing", ["save_file", "model_card", "record"])
def test_all_files_are_written_or_none(folder, capsys, monkeypatch, failing):
    def fill(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    where = f"lightning_fedfisher.cli.merge.{failing}"
    if failing == "record":
        where = "lightning_fedfisher.results.record.FederationRecord.save"
    monkeypatch.setattr(where, fill)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert main(["merge", "updates", "--output", "m.safetensors", "--method", "fedavg"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_the_model_can_be_read_by_whoever_may_read_new_files(folder):
    (folder / "new").touch()
    assert main(["merge", "updates", "--output", "m.safetensors", "--method", "fedavg"]) == 0
    for name in ("m.safetensors", "m.md", "m.json"):
        assert (folder / name).stat().st_mode == (folder / "new").stat().st_mode


def test_a_name_that_is_no_text_is_merged_and_told(folder, capsys):
    odd = os.fsdecode(b"updates/client-\xff\x1b[2J.safetensors")
    (folder / "updates/client-3.safetensors").rename(odd)
    assert main(["merge", "updates", "--output", "m.safetensors", "--method", "fedavg"]) == 0
    assert main(["verify", odd]) == 0
    told = capsys.readouterr().out
    assert r"client-\udcff\x1b[2J.safetensors: 50 samples" in told
    assert "\x1b" not in (folder / "m.md").read_text(encoding="utf-8")
    assert r"client-\udcff\x1b[2J" in [c.name for c in FederationRecord.load("m.json").clients]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "abacus"])
def test_devices_that_are_not_there_are_refused_in_a_line(folder, capsys, accelerator, dry):
    command = ["merge", "missing.safetensors", "--output", "m.safetensors", *dry]
    assert main([*command, "--accelerator", accelerator]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert "missing.safetensors" not in told  # before any update is read
    assert "Traceback" not in told
