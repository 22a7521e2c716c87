"""The fuzzer on a few files: every way to mutate, and that it notices what it must."""

import json
import random

import pytest
from fuzzing import fuzz_updates
from fuzzing.fuzz_updates import examine, main, sound_files
from fuzzing.mutations import MUTATIONS, UpdateParts
from simulation.tables.benchmarks import fuzz_table

from lightning_fedfisher import ClientUpdate


def test_a_report_counts_every_file(tmp_path):
    path = tmp_path / "fuzz.json"
    main(["--files", "300", "--output", str(path)])
    report = json.loads(path.read_text())
    assert list(report["rows"]) == list(MUTATIONS)
    assert sum(row["files"] for row in report["rows"].values()) == 300
    for row in report["rows"].values():
        assert row["files"] == row["refused"] + row["accepted"]
    assert report["rows"]["content forged"]["accepted"] > 0
    assert report["rows"]["bytes changed"]["accepted"] == 0
    assert report["crashes"] == []
    assert fuzz_table(report).splitlines()[-1].startswith("| all | 300 |")


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_change_a_file_and_come_again(mutation, tmp_path):
    one, other = (path.read_bytes() for path in sound_files(tmp_path)[1][:2])
    made = [MUTATIONS[mutation](one, other, random.Random(seed)) for seed in (0, 0, 1)]
    assert made[0] == made[1]
    assert len({*made, one}) == 3


def test_what_is_taken_apart_and_signed_is_the_same_update(tmp_path):
    for path in (path for paths in sound_files(tmp_path) for path in paths):
        before = ClientUpdate.open(path)
        path.write_bytes(UpdateParts.read(path.read_bytes()).signed())
        after = ClientUpdate.open(path)
        assert examine(path)
        assert after.digests == before.digests
        assert after.header == before.header


def test_two_thirds_of_the_files_are_packed(tmp_path):
    packed = [bool(ClientUpdate.open(f[0]).header.quantized) for f in sound_files(tmp_path)]
    assert packed == [False, True, True] * 4


@pytest.mark.parametrize("limit", ["_MOST_SECONDS", "_MOST_BYTES"])
def test_what_takes_too_much_is_a_crash(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_updates, "_MOST_TIMES", 0)
    monkeypatch.setattr(fuzz_updates, limit, -1)
    with pytest.raises(SystemExit, match="it takes"):
        main(["--files", "3", "--keep", str(tmp_path)])


def test_a_crash_is_told_and_its_file_kept(tmp_path, monkeypatch):
    def broken(path):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(fuzz_updates, "examine", broken)
    with pytest.raises(SystemExit, match="RuntimeError: on purpose"):
        main(["--files", "3", "--keep", str(tmp_path)])
    assert len(list(tmp_path.glob("crash-RuntimeError-*"))) == 3
